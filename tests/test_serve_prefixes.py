"""A server that keeps prompts: the next turns of a conversation, and further questions about a picture."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
from served import NAME, Served, expected, questions
from test_serve import message, model, processor  # noqa: F401 - fixtures

from vispec.model.prefixes import PrefixCache
from vispec.prompts import Turn, user_turn
from vispec.serve.guard import HttpLimits
from vispec.serve.service import Service, ServiceLimits

NEW = 8


def test_answers_are_the_same_and_what_is_reused_is_told(model, processor, monkeypatch):  # noqa: F811
    [(image, first)], others = questions(1), [text for _, text in questions(3)[1:]]
    monkeypatch.setattr(model.target, "prefixes", PrefixCache(1000))
    limits = ServiceLimits(batch=2, tokens=2 * 400)
    served = Served(Service(model, processor, NAME, limits), HttpLimits())
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

    def ask(*messages: dict):
        return client.chat.completions.create(model=NAME, messages=messages, max_tokens=NEW, temperature=0)

    try:
        opening = ask(message(image, first))
        said = opening.choices[0].message.content
        talk = message(image, first), {"role": "assistant", "content": said}
        with ThreadPoolExecutor(2) as pool:
            further = list(pool.map(lambda text: ask(*talk, message(text)), others))
            about_it = list(pool.map(lambda text: ask(message(image, text)), others))
        elsewhere = ask(message(questions(2)[1][0], first))
        metrics = httpx.get(f"{served.url}/metrics").text
    finally:
        served.close()
    turns = user_turn(image, first), Turn("assistant", (said,))
    assert said == expected(model, processor, turns[0], new=NEW)
    for text, next_turn, other in zip(others, further, about_it, strict=True):
        assert next_turn.choices[0].message.content == expected(model, processor, *turns, user_turn(text), new=NEW)
        assert other.choices[0].message.content == expected(model, processor, user_turn(image, text), new=NEW)
    shared = opening.usage.prompt_tokens
    reused = [answer.usage.prompt_tokens_details.cached_tokens for answer in (opening, elsewhere, *further, *about_it)]
    # the end of a prompt, where the answer begins, is read as another one where more text follows
    assert reused[:2] == [0, 0] and all(shared - 3 <= count for count in reused[2:4])
    assert all(0 < count < shared for count in reused[4:])
    assert f"\nvispec_reused_prompt_tokens_total {sum(reused)}\n" in metrics
