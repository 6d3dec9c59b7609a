"""Conversations by `vispec.generate`: several turns, the system turn, seeds, pictures from the web."""

import io
import re
import sys

import pytest
from test_generate import GOLDEN, pair, picture  # noqa: F401 - a fixture
from test_web import server  # noqa: F401 - a fixture

from vispec import generate, web
from vispec.model import decoding
from vispec.prompts import SYSTEM_TURN, Turn, build_inputs, chat_messages, load_processor, user_turn
from vispec.text import answer_text

PAIR = pair("llava_next", "vispec")


@pytest.fixture
def prompts(monkeypatch) -> list[tuple]:
    """The turns and the system turn of every prompt that is built."""
    built = []

    def build(processor, turns, system):
        built.append((tuple(turns), system))
        return build_inputs(processor, turns, system)

    monkeypatch.setattr(generate, "build_inputs", build)
    return built


def chat(monkeypatch, lines: str, *flags: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return generate.main([*PAIR, "--max-new-tokens", "6", *flags, "--chat", "what?"])


@pytest.mark.parametrize("lines", ["and this?\n why? \n", "and this?\nwhy?\n\nnever asked\n"])
def test_further_questions_see_the_conversation(lines, picture, prompts, capsys, monkeypatch):  # noqa: F811
    answers = []
    answer = generate.stream_question
    monkeypatch.setattr(generate, "stream_question", lambda *given: answers.append(answer(*given)) or answers[-1])
    assert chat(monkeypatch, lines, "--image", picture) == 0
    tokenizer = load_processor(str(GOLDEN / "llava_next" / "target")).tokenizer
    told = [answer_text(tokenizer, one.output_ids) for one in answers]
    assert len(told) == 3 and capsys.readouterr().out.count(" tokens/s ") == 3
    (first,), _ = prompts[0]
    assert first.items[0] == "what?" and len(first.items) == 2
    said = [Turn("assistant", (text,)) for text in told]
    assert prompts[1][0] == (first, said[0], user_turn("and this?"))
    assert prompts[2][0] == (first, said[0], user_turn("and this?"), said[1], user_turn("why?"))


def test_further_questions_are_read_on_and_answered_alike(picture, capsys, monkeypatch):  # noqa: F811
    reused, read = [], decoding.read_prompt
    monkeypatch.setattr(
        decoding, "read_prompt", lambda *given: reused.append((prompt := read(*given)).reused) or prompt
    )
    told = []
    for flags in ((), ("--prefix-cache", "2000")):
        assert chat(monkeypatch, "and this?\n", "--image", picture, *flags) == 0
        told.append([line for line in capsys.readouterr().out.splitlines() if " tokens/s " not in line])
    assert told[0] == told[1]
    assert [count > 0 for count in reused] == [False, False, False, True]


@pytest.mark.parametrize(("flags", "reason"), [((), "questions of --chat"), (("--chat", "--compare"), "itself")])
def test_prompts_are_kept_in_conversations_that_are_not_measured(flags, reason):
    with pytest.raises(ValueError, match=f"^--prefix-cache.* {reason}$"):
        generate.main([*PAIR, "--prefix-cache", "9", *flags, "what?"])


def test_every_answer_is_compared(picture, capsys, monkeypatch):  # noqa: F811
    assert chat(monkeypatch, "and this?\n", "--image", picture, "--compare") == 0
    assert capsys.readouterr().out.count("outputs identical: yes") == 4


def test_a_conversation_that_becomes_too_long_ends_with_one_line(capsys, monkeypatch):
    with pytest.raises(ValueError, match=r"^the conversation has become too long: \d+ tokens, the target has 1024 pos"):
        chat(monkeypatch, "and this? " * 200 + "\nmore?\n")
    assert capsys.readouterr().out.count(" tokens/s ") == 1


def test_one_question_leaves_stdin_alone(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("not read\n"))
    assert generate.main([*PAIR, "--max-new-tokens", "3", "what?"]) == 0
    assert sys.stdin.read() == "not read\n"


@pytest.mark.parametrize(
    ("flags", "system"), [([], SYSTEM_TURN), (["--system", "be brief"], "be brief"), (["--system", ""], "")]
)
def test_the_system_turn(flags, system, prompts, capsys):
    assert generate.main([*PAIR, "--max-new-tokens", "3", *flags, "what?"]) == 0
    assert [found for _, found in prompts] == [system]
    messages = chat_messages([user_turn("what?")], system)
    assert [one["role"] for one in messages] == (["system", "user"] if system else ["user"])
    assert not system or messages[0]["content"] == [{"type": "text", "text": system}]


# --- seeds ---


def drawn(capsys, *flags: str) -> tuple[str, str]:
    """The answer, and the rest of what is printed."""
    flags = ("--temperature", "1.5", "--max-new-tokens", "20", *flags)
    assert generate.main([*PAIR, *flags, "what?"]) == 0
    text, rest = re.split(r"\n\n(?=vispec )", capsys.readouterr().out)
    return text, rest


def test_a_seed_draws_the_same_text_with_any_tree_and_without_a_draft(capsys):
    texts = {drawn(capsys, "--seed", "7", "--tree", tree)[0] for tree in ("30/3/8", "4/2/1", "auto")}
    assert len(texts) == 1
    assert drawn(capsys, "--seed", "8")[0] not in texts
    text, rest = drawn(capsys, "--seed", "7", "--compare")
    assert text in texts and "over our own plain loop, outputs identical: yes" in rest and "generate()" not in rest


def test_a_seed_holds_with_the_targets_own_config_too(capsys):
    own = ["--seed", "7", "--generation-config"]
    texts = {drawn(capsys, *own, "--tree", tree)[0] for tree in ("30/3/8", "4/2/1")}
    text, rest = drawn(capsys, *own, "--compare")
    assert texts == {text} and "over our own plain loop, outputs identical: yes" in rest


def test_without_a_seed_two_samples_are_not_compared(capsys):
    _, rest = drawn(capsys, "--compare")
    assert "outputs identical: not compared, both are sampled without --seed" in rest


# --- pictures from the web ---


def test_a_picture_from_the_web_is_that_of_the_file(server, picture, capsys):  # noqa: F811
    answers = []
    for place in (f"{server}/green.png", picture):
        assert generate.main([*PAIR, "--max-new-tokens", "8", "--image", place, "what?"]) == 0
        answers.append(capsys.readouterr().out.partition("\n\n")[0])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/gone.png", r"cannot be fetched \(HTTP Error 404: Not Found\)$"),
        ("/large", r"cannot be fetched \(larger than 9,000 bytes\)$"),
        ("/text", r"cannot be read as a picture \(damaged, no picture, or none of "),
    ],
)
def test_a_picture_that_cannot_be_had_is_one_line(server, path, message, monkeypatch):  # noqa: F811
    monkeypatch.setattr(web, "MOST_BYTES", 9000)
    monkeypatch.setattr(generate, "load_model", lambda *_, **__: pytest.fail("loaded before the check"))
    with pytest.raises(ValueError, match=f"^--image {server}{path}: {message}") as caught:
        generate.main([*PAIR, "--image", f"{server}{path}", "what?"])
    assert "\n" not in str(caught.value)
