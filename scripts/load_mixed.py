"""Requests of many shapes, a tenth of them broken or left by their client, and what has to come of each."""

import json
import random
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, get_args

from load_client import HangUp, Place, Reply
from PIL import Image

from vispec.demo.conversations import text_turns
from vispec.demo.runner import questions
from vispec.demo.scenes import render, scene_of
from vispec.prompts import SYSTEM_TURN, build_inputs
from vispec.serve.conversation import conversation
from vispec.serve.pictures import PictureLimits
from vispec.serve.processors import Grammars, processors_of
from vispec.serve.protocol import ChatRequest, parse_request

if TYPE_CHECKING:
    from vispec.model.spec_model import SpecModel

LIMITS = PictureLimits(pixels=1_000_000, images=4)
BODY_BYTES = 2**20
SERVER_FLAGS = ("--max-pixels", str(LIMITS.pixels), "--max-images", str(LIMITS.images), "--max-body-mb", "1")
"""Limits that requests can pass without being large themselves."""
SPOILT_SHARE = 0.1
"""Of the requests, half of them broken and half of them left by their client."""
MOST_TOKENS = 32
"""Of an answer that its client waits for."""
SCENES = 10_000
"""Pictures of the demo that are asked about."""
LOGPROBS_MAY_DIFFER = 1e-3
"""In float32, where sums are taken in another order beside others."""


@dataclass(frozen=True)
class Case:
    """A request, and what has to come of it."""

    kind: str
    body: dict | None
    """None: it is broken."""
    content: bytes
    status: int = 200
    reason: str = ""
    """Within what the server says of it."""
    leaves: HangUp | None = None
    options: dict = field(default_factory=dict)
    """Of `ask`."""


def make_cases(rng: random.Random, model: str) -> Iterator[Case]:
    """Requests to the model of this name, without an end; what is broken is so in all ways in turn."""
    spoilt = 0
    while True:
        body = answerable(rng, model)
        if rng.random() >= SPOILT_SHARE:
            yield Case("answered", body, json.dumps(body).encode())
            continue
        ways = list(broken(body))
        yield ways[spoilt // 2 % len(ways)] if spoilt % 2 else left(rng, body)
        spoilt += 1


def left(rng: random.Random, body: dict) -> Case:
    """A client that hangs up."""
    place = rng.choice(get_args(Place))
    body = body | {"max_tokens": 200, "stream": place == "in the answer" or "stream" in body}
    body = {name: value for name, value in body.items() if name != "stream_options"}
    return Case(f"hangs up {place}", body, json.dumps(body).encode(), leaves=HangUp(place, rng.random()))


# --- what can be answered ---


def simple_question(rng: random.Random, model: str, shown: bool, tokens: int) -> dict:
    """The body of a streamed question with a greedy answer, about a picture if one is to be `shown`."""
    index = rng.randrange(SCENES)
    if shown:
        [asked] = questions(1, index)
        content = [picture_part(asked.image), {"type": "text", "text": asked.text}]
    else:
        content = text_turns(scene_of("eval", index), rng)[0][0]
    options = {"temperature": 0, "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
    return {"model": model, "messages": [{"role": "user", "content": content}], **options}


def _sampled(rng: random.Random) -> dict:
    return {"temperature": rng.choice((0.7, 1, 1.5)), "top_p": rng.choice((0.8, 1)), "seed": rng.getrandbits(32)}


def _streamed(rng: random.Random) -> dict:
    return {"stream": True, "stream_options": {"include_usage": rng.random() < 0.5}}


def _json(rng: random.Random) -> dict:
    names = {"shape": {"type": "string"}, "large": {"type": "boolean"}}
    schema = {"type": "object", "properties": names, "required": ["large"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    return {"response_format": rng.choice((wanted, {"type": "json_object"}))}


OPTIONS = [
    (0.4, _sampled),
    (0.5, _streamed),
    (0.15, lambda rng: {"stop": rng.sample((" the", ".", "ing", " a ", "never said"), 2)}),
    (0.1, lambda rng: {"n": rng.choice((2, 3))}),
    (0.1, lambda rng: {"presence_penalty": rng.uniform(-2, 2), "frequency_penalty": rng.uniform(0, 2)}),
    (0.1, lambda rng: {"repetition_penalty": rng.uniform(0.8, 1.5)}),
    (0.15, lambda rng: {"logprobs": True, "top_logprobs": rng.choice((0, 3))}),
    (0.1, lambda rng: {"speculate": False}),
    *([(0.05, _json)] if find_spec("lmformatenforcer") else []),
]
"""Parameters, and the share of the requests that have them."""


def answerable(rng: random.Random, model: str) -> dict:
    """The body of a request with an answer."""
    scene = scene_of("eval", rng.randrange(SCENES))
    messages = [{"role": "system", "content": SYSTEM_TURN}] if rng.random() < 0.3 else []
    for text, reply in text_turns(scene, rng):
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    messages.pop()  # which is to be answered
    asked = rng.choice([one for one in messages if one["role"] == "user"])
    if pictures := rng.choice((0, 0, 1, 1, 1, 2, 3)):
        parts = [picture_part(render(scene_of("eval", rng.randrange(SCENES)))) for _ in range(pictures)]
        asked["content"] = [*parts, {"type": "text", "text": asked["content"]}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": rng.randint(1, MOST_TOKENS)}
    for share, option in OPTIONS:
        body |= option(rng) if rng.random() < share else {}
    return body


def picture_part(picture: Image.Image, kept: float = 1.0) -> dict:
    """A part of a message; with `kept` the first of the file's bytes alone, such a share of them."""
    file = BytesIO()
    picture.save(file, "PNG")
    content = file.getvalue()
    return url_part("data:image/png;base64," + b64encode(content[: int(len(content) * kept)]).decode())


def url_part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


# --- what cannot ---


def broken(body: dict) -> Iterator[Case]:
    """All that can be wrong with a request."""
    whole = json.dumps(body).encode()
    small = Image.new("RGB", (8, 8))

    def showing(*parts: dict) -> dict:
        return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]}

    for kind, content, reason in (
        ("half of the JSON", whole[: len(whole) // 2], "not JSON"),
        ("no UTF-8", b'{"\xff": 1}', "not JSON"),
        ("nothing", b"", "not JSON"),
        ("a list", b"[1]", "must be a JSON object"),
        ("deep JSON", b"[" * 100_000, "not JSON"),
    ):
        yield Case(kind, None, content, 400, reason)
    for kind, changed, status, reason in (
        ("half of a picture", showing(picture_part(render(scene_of("eval", 0)), 0.5)), 400, "be read as a picture"),
        ("no picture", showing(url_part("data:image/png;base64,aGVsbG8=")), 400, "be read as a picture"),
        ("no base64", showing(url_part("data:image/png;base64,%%%")), 400, "not in base64"),
        ("a file", showing(url_part("file:///etc/passwd")), 400, "expected data:"),
        ("this machine's picture", showing(url_part("http://127.0.0.1/x.png")), 400, "are not fetched"),
        ("a large picture", showing(picture_part(Image.new("1", (1500, 1000)))), 400, "pixels are more than"),
        ("many pictures", showing(*[picture_part(small)] * (LIMITS.images + 1)), 400, "images, the server takes"),
        ("tools", {"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ("a misspelt parameter", {"temprature": 1}, 400, "unknown parameter: temprature"),
        ("a text for a number", {"temperature": "hot"}, 400, "temperature"),
        ("a number out of range", {"top_p": 2}, 400, "top_p"),
        ("no messages", {"messages": []}, 400, "messages"),
        ("an answer at the end", {"messages": [{"role": "assistant", "content": "Yes."}]}, 400, "must be the user's"),
        ("a long prompt", {"messages": [{"role": "user", "content": "What? " * 9000}]}, 400, "there is room for"),
        ("a long answer", {"max_tokens": 10**6}, 400, "there is room for"),
        ("another model", {"model": "another"}, 404, "is not here"),
        ("a huge body", {"messages": [{"role": "user", "content": "a" * BODY_BYTES}]}, 413, "bytes"),
    ):
        yield Case(kind, None, json.dumps(body | changed).encode(), status, reason)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    yield Case("a form", None, b"model=target&messages=What", 400, "not JSON", options={"headers": form})
    yield Case("another method", None, b"", 405, "Not Allowed", options={"method": "GET"})
    yield Case("another address", None, whole, 404, "Not Found", options={"url": "/v1/completions"})
    page = {"Origin": "https://elsewhere.example"}
    yield Case("a page of another host", None, whole, 403, "may not ask", options={"headers": page})


# --- what has to come of them ---


@dataclass(frozen=True)
class Answer:
    """One that is right."""

    text: str
    finish: str
    tokens: int
    logprobs: list[float]
    """Of its tokens without those that end it, where they were asked for."""


class Alone:
    """What a model answers to one request at a time.

    Args:
        model: in float32.
    """

    def __init__(self, model: "SpecModel", processor):
        self.model, self.processor = model, processor
        self._grammars = Grammars(processor.tokenizer)

    def answers(self, body: dict) -> list[Answer]:
        asked = parse_request(body)
        inputs = build_inputs(self.processor, *conversation(asked.messages, LIMITS))
        return [self._answer(asked, inputs, number) for number in range(asked.n or 1)]

    def _answer(self, asked: ChatRequest, inputs, number: int) -> Answer:
        from transformers import GenerationConfig

        ends, length = self.model.target.eos_token_ids, inputs["input_ids"].shape[1]
        sampling = {"temperature": asked.temperature, "top_p": asked.top_p or 1.0, "top_k": asked.top_k or 0}
        config = GenerationConfig(
            max_new_tokens=asked.max_tokens,
            eos_token_id=list(ends),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=bool(asked.logprobs),
            **({"do_sample": True} | sampling if asked.temperature else {}),
        )
        found = self.model.generate(
            **inputs,
            generation_config=config,
            seed=None if asked.seed is None else asked.seed + number,
            logits_processor=processors_of(asked, length, self._grammars),
        )
        ids = found.sequences[0, length:].tolist()
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True, spaces_between_special_tokens=False)
        text = text.lstrip()
        stop = min((place for one in asked.stops if (place := text.find(one)) >= 0), default=None)
        finish = "length" if stop is None and ids[-1] not in ends else "stop"
        said = [(own[0], token) for own, token in zip(found.logits or (), ids, strict=False) if token not in ends]
        return Answer(text[:stop], finish, len(ids), [float(own.log_softmax(-1)[token]) for own, token in said])


def faults(case: Case, reply: Reply, alone: Alone) -> Iterator[str]:
    """What is wrong with what came of a request."""
    if case.body is None:
        if (reply.status, reply.error) != (case.status, reply.error) or case.reason not in (reply.error or ""):
            yield f"expected {case.status} with {case.reason!r}, found {reply.status}: {reply.error}"
        return
    if reply.error is not None or reply.status not in ((200, None) if case.leaves else (200,)):
        yield f"not answered, found {reply.status}: {reply.error}"
        return
    if case.leaves is not None and not reply.choices:
        return
    answers = alone.answers(case.body)
    if case.leaves is None:
        yield from _faults_of_a_whole(case.body, reply, answers)
    for number, choice in reply.choices.items():
        if not answers[number].text.startswith(choice.text):
            yield f"answer {number} begins with {choice.text!r}, alone it is {answers[number].text!r}"


def _faults_of_a_whole(body: dict, reply: Reply, answers: list[Answer]) -> Iterator[str]:
    if not reply.whole or len(reply.choices) != len(answers):
        yield f"{len(reply.choices)} of {len(answers)} answers came, the last event {reply.whole}"
        return
    for number, answer in enumerate(answers):
        choice = reply.choices[number]
        if (choice.text, choice.finish) != (answer.text, answer.finish):
            yield (
                f"answer {number} is {choice.text!r} ({choice.finish}), alone it is {answer.text!r} ({answer.finish})"
            )
        found = [one["logprob"] for one in choice.logprobs]
        wanted = answer.logprobs if "stop" not in body else answer.logprobs[: len(found)]
        if len(found) != len(wanted) or any(
            abs(one - other) > LOGPROBS_MAY_DIFFER for one, other in zip(found, wanted, strict=True)
        ):
            yield f"logprobs of answer {number} are {found}, alone they are {wanted}"
    told = not body.get("stream") or body["stream_options"]["include_usage"]
    if told != (reply.usage is not None):
        yield f"usage is {reply.usage}, asked for: {told}"
    elif told and "stop" not in body and reply.usage["completion_tokens"] != sum(one.tokens for one in answers):
        yield f"usage counts {reply.usage['completion_tokens']} tokens, expected {sum(one.tokens for one in answers)}"
