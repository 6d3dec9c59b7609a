"""Answer files: one JSON line a question, appended as they come, with the settings that made them beside.

A line has question_id, answer_id, model_id, tstamp (Unix seconds), method and choices, one for each time the question
was answered. A choice has index (also its seed), captured (whether steps ran in CUDA graphs: all, some or none; older
files lack it), acceptance_length (accepted draft tokens of each round with a draft, speculative methods only), and with
one entry for each of the question's turns: turns (text), output_ids, idxs (0-based index of the last step, with a draft
or without one), new_tokens, wall_time (seconds, prefill included) and decode_time (seconds after the target's prefill).
"""

import fcntl
import json
import os
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vispec.cli import UserError
from vispec.evaluation.measure import Answer
from vispec.files import write_atomic, write_json_atomic


class AnswerFile:
    """An answer file that is being filled: resumable, whole after a kill, sorted and free of duplicates at the end."""

    def __init__(self, path: Path):
        self.path = path
        self.meta_path = meta_path(path)
        self.lines: dict[int | str, dict] = {}
        self._torn = False
        self._read()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs from the file while this one fills it, and read what it holds by now.

        The answer file itself is replaced when it is sorted, so a file beside it is locked. The system frees it when
        a run is killed.

        Raises:
            UserError: another run has it.
        """
        lock = self.path.with_name(f".{self.path.name}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(lock)
        if handle is None:
            raise UserError(f"{self.path} is being filled by another run; wait for it or give another --answer-file")
        try:
            self._read()
            yield
        finally:
            lock.unlink(missing_ok=True)
            os.close(handle)

    def check(self, settings: dict, unknown: tuple[str, ...] = ()) -> None:
        """Refuse settings that differ from those of the answers in the file; `unknown` names are not compared yet."""
        if not self.lines:
            return
        meta = read_meta(self.path)
        if meta is None:
            raise UserError(
                f"{self.path} has answers but no {self.meta_path.name}, so they cannot be continued; move the file "
                "away or give another --answer-file"
            )
        known = meta["settings"]
        for name in sorted((known.keys() | settings.keys()) - set(unknown)):
            if known.get(name) != settings.get(name):
                raise UserError(
                    f"{self.path} was made with {name} {known.get(name)!r}, found {settings.get(name)!r}; move the "
                    "file away or give another --answer-file"
                )

    def begin(self, settings: dict, provenance: dict) -> None:
        """Write the settings beside the file, or note that another run goes on with it."""
        self.check(settings)
        if self._torn:
            print(f"{self.path}: the last line was cut off by a kill, its question is answered again", flush=True)
            self._rewrite()
        meta = read_meta(self.path)
        if meta is not None and (self.lines or meta["settings"] == settings):
            meta.setdefault("resumed", []).append(provenance)
        else:
            meta = {"settings": settings, "provenance": provenance, "left_out": []}
        write_json_atomic(self.meta_path, meta)

    def append(self, line: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
        self.lines.setdefault(line["question_id"], line)

    def leave_out(self, question_id: int | str, reason: str) -> None:
        """Note that a question could not be asked; kept by later runs until it is answered."""
        others = [one for one in left_out_of(read_meta(self.path), self.lines) if one["question_id"] != question_id]
        found = [*others, {"question_id": question_id, "reason": reason}]
        self.note("left_out", sorted(found, key=lambda one: _question_order(one["question_id"])))

    def finish(self) -> None:
        """Sort the file by question; what has been answered by now is no longer left out."""
        self._rewrite()
        self.note("left_out", left_out_of(read_meta(self.path), self.lines))

    def note(self, name: str, value: Any) -> None:
        """Put something that was found out beside the settings, if there are any."""
        meta = read_meta(self.path)
        if meta is not None:
            write_json_atomic(self.meta_path, meta | {name: value})

    def _read(self) -> None:
        if self.path.exists():
            self.lines, self._torn = read_lines(self.path)

    def _rewrite(self) -> None:
        lines = [self.lines[name] for name in sorted(self.lines, key=_question_order)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomic(self.path, lambda file: file.write(text.encode()))
        self._torn = False


def meta_path(path: Path) -> Path:
    """Where the settings of an answer file are."""
    return path.with_name(path.name + ".meta.json")


def read_meta(path: Path) -> dict | None:
    """Settings and provenance of an answer file; None if there are none."""
    meta = meta_path(path)
    try:
        value = json.loads(meta.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{meta}: no valid JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get("settings"), dict):
        raise UserError(f"{meta}: expected an object with `settings`")
    return value


def left_out_of(meta: Mapping | None, answered: Container[int | str]) -> list[dict]:
    """The questions, as {question_id, reason}, that a file's runs could not ask and that are not answered by now."""
    return [one for one in (meta or {}).get("left_out", []) if one["question_id"] not in answered]


def read_lines(path: Path) -> tuple[dict[int | str, dict], bool]:
    """Lines of an answer file by question_id, the first one of each, and whether a kill has cut off the last line."""
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
            lines.setdefault(line["question_id"], line)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}, line {number}: no JSON object with a question_id ({error!r})") from None
    # a line is written with its end, so one without it is not whole
    return lines, bool(tail)


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


def answers_of(line: dict, path: Path) -> list[Answer]:
    """The answers of a line of `path`, one for each choice and turn."""
    try:
        return [answer for choice in line["choices"] for answer in _answers_of_choice(choice)]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}, question {line['question_id']}: no choice as expected ({error!r})") from None


def read_answers(path: Path) -> dict[int | str, list[Answer]]:
    """All answers of a file, by question."""
    lines, torn = read_lines(path)
    if torn:
        print(f"notice: {path}: the last line is cut off and not counted", file=sys.stderr)
    answers = {question: answers_of(line, path) for question, line in lines.items()}
    for question, found in answers.items():
        if not found or any(not answer.output_ids or answer.wall_time <= 0 for answer in found):
            raise UserError(f"{path}, question {question}: an answer without tokens or without a time")
    return answers


def conditions(path: Path) -> dict[str, set[str]]:
    """What answers do not say but their speed may depend on: each with the values of all runs that filled the file."""
    lines, _ = read_lines(path)
    meta = read_meta(path) or {"settings": {}}
    found = defaultdict(set)
    for run in (meta.get("provenance", {}), *meta.get("resumed", [])):
        versions = run.get("versions", {})
        found["torch"].add(versions.get("torch"))
        found["transformers"].add(versions.get("transformers"))
        found["git revision"].add(run.get("git_revision"))
    found["decoder layers"].add(meta["settings"].get("layers"))
    found["captured steps"].update(choice.get("captured") for line in lines.values() for choice in line["choices"])
    return {name: values for name, all_values in found.items() if (values := all_values - {None})}


def condition_notices(baseline: Path, spec: Path) -> list[str]:
    """One line for each of the conditions that differ between two arms, as far as both files say them."""
    ours, theirs = conditions(spec), conditions(baseline)
    told = [(name, sorted(theirs[name]), sorted(ours[name])) for name in theirs if name in ours]
    return [
        f"the arms differ in {name}: {', '.join(there)} in {baseline}, {', '.join(here)} in {spec}"
        for name, there, here in told
        if there != here
    ]


def left_out_notice(path: Path, left_out: Sequence[Mapping]) -> list[str]:
    """What is said of the questions of an answer file that could not be asked; [] if there are none."""
    if not left_out:
        return []
    first = "question {question_id}: {reason}".format_map(left_out[0])
    return [f"{path}: {len(left_out)} question(s) left out, the first one is {first}"]


def _locked(lock: Path) -> int | None:
    """The handle of a lock file that this process alone has now; None if another one has it."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # who had it takes it away in the end, and a lock on what is gone keeps nobody out
            if os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:  # it is gone
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


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


def _answers_of_choice(choice: dict) -> list[Answer]:
    columns = [choice[name] for name in ("output_ids", "idxs", "wall_time", "decode_time")]
    lengths = choice.get("acceptance_length", [])
    answers = []
    for turn, (ids, last_round, wall, decode) in enumerate(zip(*columns, strict=True)):
        # the acceptance lengths of all turns are one list; they are kept with the first
        answers.append(Answer(ids, last_round, wall, decode, lengths if turn == 0 else []))
    return answers


def _question_order(question_id: int | str) -> tuple[bool, int | str]:
    return isinstance(question_id, str), question_id
