"""Answer files: one JSON line a question, and in a file beside it the settings and what made them.

A line has question_id, answer_id, model_id, tstamp (Unix seconds), method, what the benchmark says of the question
besides, such as its topic, and choices, one for each time the question was answered. A choice has index (also its
seed), acceptance_length (accepted draft tokens of each round with a draft, speculative methods only), and with one
entry for each of the question's turns: turns (text), output_ids, idxs (0-based index of the last step, with a draft or
without one), new_tokens, wall_time (seconds, prefill included) and decode_time (seconds after the target's prefill);
where there are several turns also rounds (how many of those with a draft each turn has). Of how its steps ran it has
captured (in CUDA graphs: all, some or none) and kernels (those of the target's products, see `Target.kernels`).

The file beside has the number of the format, settings, provenance and, of later runs, `resumed`; left_out, and what
else was found out.
"""

import reprlib
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vispec.cli import UserError
from vispec.evaluation.measure import Answer
from vispec.evaluation.settings import SETTINGS, noted_tree, shared_by
from vispec.files import parse_json, read_json
from vispec.methods import GENERATE, UNDRAFTED
from vispec.model.shape import AUTO, TUNE

if TYPE_CHECKING:
    from vispec.model.spec_model import SpecModel

FORMAT = 2
"""Of the file beside the answers; the first one said neither its number nor which weights the target had."""
META_KINDS = {"provenance": (dict,), "resumed": (list,), "left_out": (list,)}
RUN_KINDS = {"versions": (dict,)}
LEFT_OUT_KINDS = {"question_id": (int, str), "reason": (str,)}
"""What is read by name: of the whole, of each run, and of each question that is left out."""
BEGIN = b'{"question_id": '
"""Of a line as we write it."""
LARGEST = 2**31
"""Bound of whole numbers."""
LONGEST = 1e9
"""Bound of times, in seconds."""

NO_LABELS: Mapping[str, str] = MappingProxyType({})

QuestionId = int | str


class AnswerFile:
    """What an answer file holds."""

    def __init__(self, path: Path):
        """Read it; one that is not there is empty.

        Raises:
            UserError: it is not as it should be; names the line and what was found.
        """
        self.path = path
        self.read()

    def read(self) -> None:
        self.meta = read_meta(self.path)
        self.lines: dict[QuestionId, dict] = {}
        """By question, the first one of each."""
        self.answers: dict[QuestionId, list[Answer]] = {}
        """One for each choice and turn."""
        *whole, tail = (self.path.read_bytes() if self.path.exists() else b"").split(b"\n")
        self.torn = bool(tail)
        """Whether a kill has cut off the last line: a line is written with its end."""
        for number, text in enumerate(whole, start=1):
            if not text.strip():
                continue
            try:
                line = parse_json(text, "its text")
                answers = answers_of(line)
            except ValueError as error:
                raise UserError(f"{self.path}, line {number}: this is no line of an answer file: {error}") from None
            self.lines.setdefault(line["question_id"], line)
            self.answers.setdefault(line["question_id"], answers)
        if not (tail.startswith(BEGIN) or BEGIN.startswith(tail)):
            found = reprlib.repr(tail.decode(errors="replace"))
            raise UserError(f"{self.path}: the last line is no line of an answer file: {found}")

    @property
    def settings(self) -> dict:
        """Empty where there is no file with settings."""
        return self.meta["settings"] if self.meta else {}

    @property
    def left_out(self) -> list[dict]:
        """The questions, as {question_id, reason}, that runs could not ask and that are not answered by now."""
        found = self.meta.get("left_out", []) if self.meta else []
        return [one for one in found if one["question_id"] not in self.lines]

    @cached_property
    def conditions(self) -> dict[str, list[str]]:
        """What answers do not say but their speed may depend on: each with the values of all runs and answers."""
        meta, found = self.meta or {}, defaultdict(list)
        for run in (meta.get("provenance", {}), *meta.get("resumed", [])):
            for package in ("torch", "transformers"):
                found[package].append(run.get("versions", {}).get(package))
            found["git revision"].append(run.get("git_revision"))
        found["decoder layers"].append(self.settings.get("layers"))
        for choice in (choice for line in self.lines.values() for choice in line["choices"]):
            found["captured steps"].append(choice.get("captured"))
            for product, kernel in choice.get("kernels", {}).items():
                found[f"the kernel of {product}"].append(kernel)
        told = {name: sorted({str(v) for v in values if v is not None}) for name, values in found.items()}
        return {name: values for name, values in told.items() if values}


def read_answers(path: Path) -> AnswerFile:
    """An answer file that has to be there.

    Raises:
        UserError: it is not, or not as it should be.
    """
    if not path.exists():
        raise UserError(f"there is no answer file {path}")
    file = AnswerFile(path)
    if file.torn:
        print(f"notice: {path}: the last line is cut off and not counted", file=sys.stderr)
    return file


def refuse_differences(why: str, one: AnswerFile, other: AnswerFile) -> None:
    """Compare the settings of two files.

    Args:
        why: what the files are to be, of ARMS, TABLE and ROW.

    Raises:
        UserError: they differ in a setting that they must share; says `why` and names both files.
    """
    for name in shared_by(why):
        expected, found = (file.settings.get(name) for file in (one, other))
        if found != expected:
            raise UserError(f"{why}: {name} is {expected!r} in {one.path} and {found!r} in {other.path}")


def condition_notices(baseline: AnswerFile, spec: AnswerFile) -> list[str]:
    """One line for each of the conditions that differ between two arms, as far as both files say them."""
    theirs, ours = baseline.conditions, spec.conditions
    return [
        f"the arms differ in {name}: {', '.join(there)} in {baseline.path}, {', '.join(ours[name])} in {spec.path}"
        for name, there in theirs.items()
        if there != ours.get(name, there)
    ]


def left_out_notice(file: AnswerFile) -> list[str]:
    """What is said of the questions that could not be asked; [] if there are none."""
    if not file.left_out:
        return []
    first = "question {question_id}: {reason}".format_map(file.left_out[0])
    return [f"{file.path}: {len(file.left_out)} question(s) left out, the first one is {first}"]


# --- the file beside ---


def meta_path(path: Path) -> Path:
    """Where the settings of an answer file are."""
    return path.with_name(path.name + ".meta.json")


def read_meta(path: Path) -> dict | None:
    """Settings and provenance of an answer file; None if there are none.

    Raises:
        UserError: they are of another format, or not as they should be.
    """
    meta = meta_path(path)
    try:
        value = read_json(meta)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(str(error)) from None
    if not isinstance(value.get("settings"), dict):
        raise UserError(f"{meta}: expected an object with `settings`")
    found = value.get("format", 1)
    if found != FORMAT:
        raise UserError(
            f"{meta}: these answers are of format {reprlib.repr(found)}, this version of vispec has format {FORMAT}; "
            "move them away, or give another --answer-file"
        )
    _check_kinds(meta, value, META_KINDS)
    _check_kinds(meta, value["settings"], {name: setting.kinds for name, setting in SETTINGS.items()})
    for name in ("asked_tree", "tree"):
        tree = value["settings"].get(name)
        if tree not in (None, AUTO, TUNE) and not _is_tree(tree):
            raise UserError(f"{meta}: {name} cannot be {reprlib.repr(tree)}")
    for run in (value.get("provenance", {}), *value.get("resumed", [])):
        _check_kinds(meta, run, RUN_KINDS)
    for one in value.get("left_out", []):
        _check_kinds(meta, one, LEFT_OUT_KINDS, needed=True)
    return value


def _is_tree(noted: list | str) -> bool:
    """Whether it is a note of one."""
    if isinstance(noted, list) and list(map(type, noted)) != [int] * 3:
        return False
    try:
        noted_tree(noted)
    except ValueError:
        return False
    return True


def _check_kinds(meta: Path, values: Any, kinds: Mapping[str, tuple[type, ...]], needed: bool = False) -> None:
    """Refuse what is no object or has something of another type than `kinds` says; where `needed`, what lacks it."""
    if not isinstance(values, dict):
        raise UserError(f"{meta}: expected an object, found {reprlib.repr(values)}")
    for name, types in kinds.items():
        found = values.get(name)
        if (name in values or needed) and type(found) not in types:
            raise UserError(f"{meta}: {name} cannot be {reprlib.repr(found)}")


# --- a line ---


def answer_line(
    question_id: QuestionId, model_id: str, method: str, choices: Iterable[dict], labels: Mapping[str, str] = NO_LABELS
) -> dict:
    """The line of a question, with what `choice_of` gives for each of its answers; `labels`: see `Question`."""
    return {
        "question_id": question_id,
        **labels,
        "answer_id": uuid.uuid4().hex,
        "model_id": model_id,
        "tstamp": time.time(),
        "method": method,
        "choices": [{"index": index, **choice} for index, choice in enumerate(choices)],
    }


def choice_of(answers: Sequence[Answer], texts: Sequence[str], model: "SpecModel", method: str) -> dict[str, Any]:
    """The answers to a question's turns as a line has them, with how the model's steps ran, where they were ours."""
    choice = {
        "turns": list(texts),
        "output_ids": [answer.output_ids for answer in answers],
        "idxs": [answer.last_round for answer in answers],
        "new_tokens": [len(answer.output_ids) for answer in answers],
        "wall_time": [answer.wall_time for answer in answers],
        "decode_time": [answer.decode_time for answer in answers],
    }
    if method != GENERATE:
        choice |= {"captured": model.captured, "kernels": model.target.kernels}
    if method not in UNDRAFTED:
        choice |= {"acceptance_length": [length for answer in answers for length in answer.acceptance_lengths]}
        if len(answers) > 1:
            choice |= {"rounds": [len(answer.acceptance_lengths) for answer in answers]}
    return choice


def answers_of(line: Any) -> list[Answer]:
    """The answers of a line, one for each choice and turn.

    Raises:
        ValueError: it is not as it should be; says what was found.
    """
    question = line.get("question_id") if isinstance(line, dict) else None
    if type(question) not in (int, str):
        raise ValueError(f"expected an object with a question_id, found {reprlib.repr(line)}")
    choices = line.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"question {question}: expected a list of choices, found {reprlib.repr(choices)}")
    try:
        return [answer for choice in choices for answer in _answers_of_choice(choice)]
    except ValueError as error:
        raise ValueError(f"question {question}: {error}") from None


def _answers_of_choice(choice: Any) -> list[Answer]:
    if not isinstance(choice, dict):
        raise ValueError(f"expected a choice as an object, found {reprlib.repr(choice)}")
    if choice.get("captured") not in (None, "all", "some", "none"):
        raise ValueError(f"captured: expected all, some or none, found {reprlib.repr(choice['captured'])}")
    kernels = choice.get("kernels", {})
    if not isinstance(kernels, dict) or not all(isinstance(kernel, str) for kernel in kernels.values()):
        raise ValueError(f"kernels: expected an object of names, found {reprlib.repr(kernels)}")
    columns = [_column(choice.get(name), name, *of) for name, of in _COLUMNS.items()]
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"expected one entry for each turn in all of {', '.join(_COLUMNS)}")
    lengths = _column(choice.get("acceptance_length", []), "acceptance_length", _whole, "whole numbers from 0 on")
    turns = len(columns[0])
    # the acceptance lengths of all turns are one list
    rounds = choice.get("rounds", [len(lengths), *[0] * turns][:turns])
    rounds = _column(rounds, "rounds", _whole, "whole numbers from 0 on")
    if (len(rounds), sum(rounds)) != (turns, len(lengths)):
        raise ValueError(f"rounds: expected {turns} numbers with the sum {len(lengths)}, found {reprlib.repr(rounds)}")
    rest = iter(lengths)
    accepted = [list(islice(rest, own)) for own in rounds]
    return [Answer(*of_turn, own) for *of_turn, own in zip(*columns, accepted, strict=True)]


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
"""What a choice has for each turn, in the order of `Answer`: what its entries are."""
