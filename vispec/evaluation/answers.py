"""Answer files: one JSON line a question, appended as they come, with the settings that made them beside.

What a line holds, `vispec.evaluation.answer_lines` says. The file beside has the number of the format, settings,
provenance and, of later runs, `resumed`; left_out, and what else was found out.
"""

import json
import reprlib
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vispec.cli import UserError
from vispec.evaluation.answer_lines import read_lines
from vispec.files import read_json, write_atomic, write_json_atomic
from vispec.locks import held

FORMAT = 2
"""Of the file beside the answers; the first one said neither its number nor which weights the target had."""
META_KINDS = {"provenance": dict, "resumed": list, "left_out": list}
SETTING_KINDS = {
    "benchmark": str, "method": str, "base_model": str, "temperature": (int, float), "max_new_tokens": int,
    "num_choices": int, "dtype": str, "device": str, "device_type": str, "devices": int, "layers": str,
}  # fmt: skip
RUN_KINDS = {"versions": dict}
LEFT_OUT_KINDS = {"question_id": (int, str), "reason": str}
"""What is read by name: of the whole, of the settings, of each run, and of each question that is left out."""


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

        The answer file itself is replaced when it is sorted, so a file beside it is locked, see `vispec.locks.held`.

        Raises:
            ValueError: another run has it.
        """
        lock = self.path.with_name(f".{self.path.name}.lock")
        refusal = f"{self.path} is being filled by another run; wait for it or give another --answer-file"
        with held(lock, refusal):
            self._read()
            yield

    def check(self, settings: dict, unknown: tuple[str, ...] = ()) -> None:
        """Refuse a file that is not ours, and settings that differ from those of its answers.

        Args:
            unknown: names of settings that are not compared yet.
        """
        meta = read_meta(self.path)
        if meta is None and (self.lines or self._torn):
            raise UserError(
                f"{self.path} is there, but no {self.meta_path.name} beside it, so it cannot be continued; move it "
                "away or give another --answer-file"
            )
        if not self.lines:
            return
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
            meta = {"format": FORMAT, "settings": settings, "provenance": provenance, "left_out": []}
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
            if not self.path.is_file():
                raise UserError(f"{self.path} is no regular file, give another --answer-file")
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
    _check_kinds(meta, value["settings"], SETTING_KINDS)
    for run in (value.get("provenance", {}), *value.get("resumed", [])):
        _check_kinds(meta, run, RUN_KINDS)
    for one in value.get("left_out", []):
        _check_kinds(meta, one, LEFT_OUT_KINDS, needed=True)
    return value


def _check_kinds(meta: Path, values: Any, kinds: Mapping[str, type | tuple[type, ...]], needed: bool = False) -> None:
    """Refuse what is no object or has something of another type than `kinds` says; where `needed`, what lacks it."""
    if not isinstance(values, dict):
        raise UserError(f"{meta}: expected an object, found {reprlib.repr(values)}")
    for name, kind in kinds.items():
        found = values.get(name)
        if (name in values or needed) and (not isinstance(found, kind) or isinstance(found, bool)):
            raise UserError(f"{meta}: {name} cannot be {reprlib.repr(found)}")


def left_out_of(meta: Mapping | None, answered: Container[int | str]) -> list[dict]:
    """The questions, as {question_id, reason}, that a file's runs could not ask and that are not answered by now."""
    return [one for one in (meta or {}).get("left_out", []) if one["question_id"] not in answered]


def conditions(path: Path) -> dict[str, set[str]]:
    """What answers do not say but their speed may depend on: each with the values of all runs that filled the file."""
    lines, _ = read_lines(path)
    meta = read_meta(path) or {"settings": {}}
    found = defaultdict(list)
    for run in (meta.get("provenance", {}), *meta.get("resumed", [])):
        versions = run.get("versions", {})
        found["torch"].append(versions.get("torch"))
        found["transformers"].append(versions.get("transformers"))
        found["git revision"].append(run.get("git_revision"))
    found["decoder layers"].append(meta["settings"].get("layers"))
    found["captured steps"] += [choice.get("captured") for line in lines.values() for choice in line["choices"]]
    told = {name: {str(value) for value in values if value is not None} for name, values in found.items()}
    return {name: values for name, values in told.items() if values}


def condition_notices(baseline: tuple[Path, Mapping], spec: tuple[Path, Mapping]) -> list[str]:
    """One line for each of the conditions that differ between two arms, as far as both files say them.

    Args:
        baseline, spec: a file and its `conditions`.
    """
    (plain_path, theirs), (spec_path, ours) = baseline, spec
    told = [(name, sorted(theirs[name]), sorted(ours[name])) for name in theirs if name in ours]
    return [
        f"the arms differ in {name}: {', '.join(there)} in {plain_path}, {', '.join(here)} in {spec_path}"
        for name, there, here in told
        if there != here
    ]


def left_out_notice(path: Path, left_out: Sequence[Mapping]) -> list[str]:
    """What is said of the questions of an answer file that could not be asked; [] if there are none."""
    if not left_out:
        return []
    first = "question {question_id}: {reason}".format_map(left_out[0])
    return [f"{path}: {len(left_out)} question(s) left out, the first one is {first}"]


def _question_order(question_id: int | str) -> tuple[bool, int | str]:
    return isinstance(question_id, str), question_id
