"""The lines of answer files: how they are written, and what is checked where they are read.

A line has question_id, answer_id, model_id, tstamp (Unix seconds), method and choices, one for each time the question
was answered. A choice has index (also its seed), captured (whether steps ran in CUDA graphs: all, some or none),
acceptance_length (accepted draft tokens of each round with a draft, speculative methods only), and with one entry for
each of the question's turns: turns (text), output_ids, idxs (0-based index of the last step, with a draft or without
one), new_tokens, wall_time (seconds, prefill included) and decode_time (seconds after the target's prefill).
"""

import json
import reprlib
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vispec.cli import UserError
from vispec.evaluation.measure import Answer

LARGEST = 2**31
"""Bound of whole numbers."""
LONGEST = 1e9
"""Bound of times, in seconds."""


def answer_line(question_id: int | str, model_id: str, method: str, answers: list[tuple[Answer, str, str]]) -> dict:
    """The file's line for a question: (answer, its text, whether its steps were captured) of every choice, in order."""
    return {
        "question_id": question_id,
        "answer_id": uuid.uuid4().hex,
        "model_id": model_id,
        "tstamp": time.time(),
        "method": method,
        "choices": [_choice(index, *answer, method) for index, answer in enumerate(answers)],
    }


def read_lines(path: Path) -> tuple[dict[int | str, dict], bool]:
    """Lines of an answer file by question_id, the first one of each, and whether a kill has cut off the last line.

    Raises:
        UserError: there is no such file, or a line is not as it should be; names the line and what was found.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no answer file {path}") from None
    *whole, tail = raw.split(b"\n")
    lines: dict[int | str, dict] = {}
    for number, text in enumerate(whole, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            answers_of(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: this is no line of an answer file: {error}") from None
        lines.setdefault(line["question_id"], line)
    # a line is written with its end, so one without it is not whole
    return lines, bool(tail)


def read_answers(path: Path) -> dict[int | str, list[Answer]]:
    """All answers of a file, by question."""
    lines, torn = read_lines(path)
    if torn:
        print(f"notice: {path}: the last line is cut off and not counted", file=sys.stderr)
    return {question: answers_of(line) for question, line in lines.items()}


def answers_of(line: Any) -> list[Answer]:
    """The answers of a line, one for each choice and turn.

    Raises:
        ValueError: it is not as it should be; says what was found.
    """
    question = line.get("question_id") if isinstance(line, dict) else None
    if not isinstance(question, int | str) or isinstance(question, bool):
        raise ValueError(f"expected an object with a question_id, found {reprlib.repr(line)}")
    choices = line.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"question {question}: expected a list of choices, found {reprlib.repr(choices)}")
    try:
        return [answer for choice in choices for answer in _answers_of_choice(choice)]
    except ValueError as error:
        raise ValueError(f"question {question}: {error}") from None


def _choice(index: int, answer: Answer, text: str, captured: str, method: str) -> dict[str, Any]:
    choice = {
        "index": index,
        "turns": [text],
        "output_ids": [answer.output_ids],
        "idxs": [answer.last_round],
        "new_tokens": [len(answer.output_ids)],
        "wall_time": [answer.wall_time],
        "decode_time": [answer.decode_time],
        "captured": captured,
    }
    if method != "baseline":
        choice["acceptance_length"] = answer.acceptance_lengths
    return choice


def _answers_of_choice(choice: Any) -> list[Answer]:
    if not isinstance(choice, dict):
        raise ValueError(f"expected a choice as an object, found {reprlib.repr(choice)}")
    if choice.get("captured") not in (None, "all", "some", "none"):
        raise ValueError(f"captured: expected all, some or none, found {reprlib.repr(choice['captured'])}")
    columns = [_column(choice.get(name), name, *of) for name, of in _COLUMNS.items()]
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"expected one entry for each turn in all of {', '.join(_COLUMNS)}")
    lengths = _column(choice.get("acceptance_length", []), "acceptance_length", _whole, "whole numbers from 0 on")
    answers = []
    for turn, (ids, last_round, wall, decode) in enumerate(zip(*columns, strict=True)):
        # the acceptance lengths of all turns are one list; they are kept with the first
        answers.append(Answer(ids, last_round, wall, decode, lengths if turn == 0 else []))
    return answers


def _column(value: Any, name: str, fits: Callable[[Any], bool], expected: str) -> list:
    if not isinstance(value, list) or not all(map(fits, value)):
        raise ValueError(f"{name}: expected a list of {expected}, found {reprlib.repr(value)}")
    return value


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def _time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < LONGEST


_COLUMNS = {
    "output_ids": (
        lambda value: isinstance(value, list) and bool(value) and all(map(_whole, value)),
        "answers, each a list of token ids that is not empty",
    ),
    "idxs": (lambda value: value == -1 or _whole(value), "whole numbers from -1 on"),
    "wall_time": (lambda value: _time(value) and value > 0, "seconds above 0"),
    "decode_time": (_time, "seconds from 0 on"),
}
"""What a choice has for each turn: what its entries are."""
