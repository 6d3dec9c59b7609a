"""Whether a speculative arm says what the baseline says: output ids compared question by question.

In float32 they have to be the same. In half precision a pass over a tree and a pass over one token round differently,
so near-ties may fall differently: such questions are counted, and one of them is answered again in float32, by both
arms, where the difference has to go away.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vispec.cli import UserError, one_line
from vispec.evaluation.answer_file import QuestionId, meta_path, read_answers, read_meta
from vispec.evaluation.measure import Answer, is_greedy
from vispec.evaluation.settings import ARMS, shared_by
from vispec.evaluation.task import Task

RERUN_FAILS = (RuntimeError, MemoryError, ValueError, OSError, ImportError)
"""What comes of a target that is too large in float32 (torch's error is a RuntimeError), or cannot be loaded so."""


class Difference(NamedTuple):
    """Where the two arms part first in a question's answers."""

    question_id: QuestionId
    choice: int
    turn: int
    position: int
    """0-based index into the new tokens; the length of the shorter answer if it is the other's beginning."""


def wants_check(flag: bool | None, temperature: float) -> bool:
    """Whether to compare: as the flag says, and greedily where it says nothing.

    Raises:
        UserError: the flag asks for it while tokens are sampled.
    """
    greedy = is_greedy(temperature)
    if flag and not greedy:
        raise UserError(f"--check-lossless=True: expected --temperature 0, found {temperature}: samples need not agree")
    return greedy if flag is None else flag


def check_lossless(task: Task, required: bool, rerun: Callable[[QuestionId], Sequence[list[int]]]) -> bool:
    """Compare a finished answer file with the baseline's of the same settings, print and note what comes out.

    Args:
        required: whether a missing baseline is an error.
        rerun: answers a question again in float32; gives the output ids of the baseline and of the method. What it
            raises of `RERUN_FAILS` is said, and the check goes on.

    Returns:
        False where the arms differ in float32.
    """
    baseline = find_baseline(task) if task.lines else None
    if baseline is None:
        if required:
            raise UserError(
                f"--check-lossless=True: no baseline's answer file of the same settings in {task.path.parent.resolve()}"
            )
        return True
    dtype = task.settings.get("dtype")
    read = read_answers(task.path)
    plain, ours = read_answers(baseline).answers, read.answers
    shared = [question for question in ours if question in plain]
    differences = [
        found
        for question in shared
        if (found := _difference(question, len(read.lines[question]["choices"]), plain[question], ours[question]))
    ]
    note = {"baseline": baseline.name, "questions": len(shared), "identical": len(shared) - len(differences)}
    same = _report(note, differences, baseline, dtype)
    if differences:
        note["first_difference"] = differences[0]._asdict()
    task.note("lossless", note)
    if differences and dtype != "float32":
        # only now, since the system may kill who asks for too much memory
        same = _answer_again(differences[0].question_id, rerun, note)
        task.note("lossless", note)
    return same


def find_baseline(task: Task) -> Path | None:
    """The baseline's answer file beside a task's that was made with the same settings: the latest one."""
    found = []
    for candidate in task.path.parent.iterdir():
        if candidate == task.path or not meta_path(candidate).is_file():
            continue
        try:
            other = read_meta(candidate)["settings"]
        except UserError as error:  # another file, which nobody has named
            print(f"notice: not compared with: {error}", file=sys.stderr)
            continue
        same = all(other.get(name) == task.settings.get(name) for name in shared_by(ARMS))
        if other.get("method") == "baseline" and same:
            found.append(candidate)
    return max(found, key=lambda candidate: candidate.stat().st_mtime, default=None)


def first_position(ids: Sequence[int], others: Sequence[int]) -> int | None:
    """Index at which two answers part; None if they are the same."""
    for position, (one, other) in enumerate(zip(ids, others, strict=False)):
        if one != other:
            return position
    return None if len(ids) == len(others) else min(len(ids), len(others))


def _difference(
    question: QuestionId, choices: int, baseline: Sequence[Answer], spec: Sequence[Answer]
) -> Difference | None:
    for number, (plain, ours) in enumerate(zip(baseline, spec, strict=True)):
        position = first_position(plain.output_ids, ours.output_ids)
        if position is not None:
            return Difference(question, *divmod(number, len(spec) // choices), position)
    return None


def _report(note: Mapping, differences: Sequence[Difference], baseline: Path, dtype: str | None) -> bool:
    """Print what was compared; False where the arms differ in float32."""
    identical, questions = note["identical"], note["questions"]
    if not questions:
        print(f"lossless: {baseline} has answered none of these questions, so nothing is compared")
        return True
    share = f"{100 * identical / questions:.1f} %"
    print(f"lossless: {identical} of {questions} questions ({share}) with the output ids of {baseline}, in {dtype}")
    if not differences:
        return True
    first = differences[0]
    turn = f", turn {first.turn + 1}" if first.turn else ""
    print(
        f"lossless: first difference in question {first.question_id}{turn}, at new token {first.position}, counted "
        "from 0"
    )
    if dtype == "float32":
        print("error: the arms differ in float32, where they must not", file=sys.stderr)
        return False
    return True


def _answer_again(question: QuestionId, rerun: Callable, note: dict) -> bool:
    """Answer a question in float32, print and note what comes out; False where the arms differ."""
    try:
        plain, ours = rerun(question)
    except RERUN_FAILS as error:
        reason = one_line(error)
        print(f"lossless: question {question} cannot be answered again in float32: {reason}")
        note["not_answered_in_float32"] = reason
        return True
    note["identical_in_float32"] = same = _report_rerun(question, plain, ours)
    return same


def _report_rerun(question: QuestionId, plain: list[int], ours: list[int]) -> bool:
    position = first_position(plain, ours)
    if position is None:
        print(f"lossless: question {question} again in float32: both arms give the same {len(plain)} output ids")
        return True
    print(f"error: question {question} again in float32: the arms differ at new token {position}", file=sys.stderr)
    return False
