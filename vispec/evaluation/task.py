"""An answer file that is being filled: resumable, whole after a kill, sorted and free of duplicates at the end."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vispec.cli import UserError
from vispec.evaluation.answer_file import FORMAT, NO_LABELS, AnswerFile, QuestionId, answer_line, meta_path
from vispec.evaluation.settings import LOADED
from vispec.files import json_bytes, remove_unfinished, write_bytes_atomic, write_json_atomic
from vispec.locks import held


class Task(AnswerFile):
    """A method's answers to a benchmark's questions, to be put into a file."""

    def __init__(
        self, path: Path, asked: Mapping, model_id: str = "", authors_row: Callable[[Mapping], dict] | None = None
    ):
        """Read what is there.

        Args:
            asked: the settings, without what only loaded models tell.
            model_id: names the answers.
            authors_row: see `Benchmark`.
        """
        self.asked, self.model_id, self.authors_row = dict(asked), model_id, authors_row
        self.method: str = asked["method"]
        super().__init__(path)

    def read(self) -> None:
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"{self.path} is no regular file, give another --answer-file")
        super().read()

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
            name, rows = (re.escape(path.name) for path in (self.path, self.authors_path))
            remove_unfinished(self.path.parent, rf"{name}(\.meta\.json)?|{rows}")
            self.read()
            yield

    def check(self, loaded: Mapping[str, Mapping] | None = None) -> None:
        """Refuse a file that is not ours, and settings that differ from those of its answers.

        Args:
            loaded: by method what loaded models tell, see `Answerer.loaded_settings`; ours may lack.

        Raises:
            UserError: it names the setting.
        """
        if self.meta is None and (self.lines or self.torn):
            raise UserError(
                f"{self.path} is there, but no {meta_path(self.path).name} beside it, so it cannot be continued; move "
                "it away or give another --answer-file"
            )
        if not self.lines:
            return
        settings = self.asked | (loaded.get(self.method, loaded["baseline"]) if loaded else {})
        unknown = () if loaded and self.method in loaded else LOADED
        for name in sorted(self.settings.keys() | settings.keys()):
            known, found = self.settings.get(name), settings.get(name)
            if known != found and (name in settings or name not in unknown):
                raise UserError(
                    f"{self.path} was made with {name} {known!r}, found {found!r}; move the file away or give another "
                    "--answer-file"
                )

    def begin(self, loaded: Mapping[str, Mapping], provenance: dict) -> None:
        """Write the settings beside the file, or note that another run goes on with it."""
        settings = self.asked | loaded[self.method]
        if self.torn:
            print(f"{self.path}: the last line was cut off by a kill, its question is answered again", flush=True)
            self._rewrite()
        if self.meta is not None and (self.lines or self.settings == settings):
            self.note("resumed", [*self.meta.get("resumed", []), provenance])
        else:
            self.meta = {"format": FORMAT, "settings": settings, "provenance": provenance}
            self.note("left_out", [])

    def append(self, question_id: QuestionId, choices: list[dict], labels: Mapping[str, str] = NO_LABELS) -> None:
        """Add the answers to a question, each as `choice_of` gives it; `labels`: see `Question`."""
        line = answer_line(question_id, self.model_id, self.method, choices, labels)
        with self.path.open("ab") as file:
            file.write(json_bytes(line) + b"\n")
            file.flush()
        self.lines.setdefault(question_id, line)

    def leave_out(self, question_id: QuestionId, reason: str) -> None:
        """Note that a question could not be asked; kept by later runs until it is answered."""
        others = [one for one in self.left_out if one["question_id"] != question_id]
        found = [*others, {"question_id": question_id, "reason": reason}]
        self.note("left_out", sorted(found, key=lambda one: _order(one["question_id"])))

    def finish(self) -> None:
        """Sort the file by question; what has been answered by now is no longer left out."""
        self._rewrite()
        if self.authors_row is not None:
            _write_lines(self.authors_path, map(self.authors_row, self._sorted()))
        self.note("left_out", self.left_out)

    def note(self, name: str, value: Any) -> None:
        """Put something that was found out beside the settings, if there are any."""
        if self.meta is not None:
            self.meta = self.meta | {name: value}
            write_json_atomic(meta_path(self.path), self.meta)

    @property
    def authors_path(self) -> Path:
        """Where lines are as the benchmark's authors have them, if there are any."""
        return self.path.with_name(f"{self.path.name.removesuffix('.jsonl')}.{self.asked.get('benchmark')}-rows")

    def _sorted(self) -> list[dict]:
        return [self.lines[name] for name in sorted(self.lines, key=_order)]

    def _rewrite(self) -> None:
        _write_lines(self.path, self._sorted())
        self.torn = False


def _write_lines(path: Path, lines: Iterable[Mapping]) -> None:
    write_bytes_atomic(path, b"".join(json_bytes(line) + b"\n" for line in lines))


def _order(question_id: QuestionId) -> tuple[bool, QuestionId]:
    return isinstance(question_id, str), question_id
