"""The folder of one generation run: sample files, what made them, what was skipped and why."""

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vispec.cli import changes, provenance
from vispec.files import UNFINISHED, read_json, remove_unfinished, write_json_atomic
from vispec.ge_data.sample_file import SUFFIX, file_name

MANIFEST = "manifest.json"
MARK = "mark"
NO_TARGET = dict.fromkeys(("model", "revision", "dtype"))
"""What a manifest says of the target, each as text or null."""
PLAIN = str | int | float | bool | None
"""What the arguments of a run are."""


@dataclass
class RunFolder:
    """Opened once by the command; its workers only write sample files."""

    path: Path
    arguments: dict
    """What decides the files' content; a run with others is refused."""
    manifest: dict = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path, arguments: Mapping, target: Mapping) -> "RunFolder":
        """Begin a run in a folder that is there, or go on with one that was interrupted.

        Args:
            target: what `identify_target` says of it.

        Raises:
            ValueError: the folder holds files that other arguments or another target made.
        """
        path = Path(path)
        arguments = dict(arguments)
        if manifest := read_manifest(path):
            if differences := changes(manifest["arguments"], arguments):
                raise ValueError(f"{path} was made with other arguments ({differences}); choose another --outdir")
            # earlier versions did not note the target
            if differences := changes(manifest.get("target", target), target):
                raise ValueError(f"{path} was made by another target ({differences}); choose another --outdir")
        elif any(path.glob(f"*{SUFFIX}")):
            raise ValueError(f"{path} holds sample files but no {MANIFEST}; choose another --outdir")
        else:
            made_by = provenance(arguments)
            made_by.pop("arguments")
            manifest = {"arguments": arguments, "target": dict(target), "complete": False, **made_by}
            write_json_atomic(path / MANIFEST, manifest)
        folder = cls(path, arguments, manifest)
        folder.remove_unfinished()
        return folder

    def remove_unfinished(self) -> None:
        """Remove what processes that were killed were at."""
        remove_unfinished(self.path, rf"\d+{re.escape(SUFFIX)}|{re.escape(MANIFEST)}|{MARK}")
        remove_unfinished(self.path / "logs", r"rows_\d+\.json")

    @contextmanager
    def marked(self) -> Iterator[Path]:
        """A file in the folder, by which another machine can tell whether it sees the same one."""
        with tempfile.NamedTemporaryFile(dir=self.path, prefix=f".{MARK}.", suffix=UNFINISHED) as file:
            yield Path(file.name)

    def sample_path(self, index: int) -> Path:
        return self.path / file_name(index)

    def sample_files(self) -> list[Path]:
        return sorted(self.path.glob(f"*{SUFFIX}"))

    def missing(self, indices: Iterable[int]) -> list[int]:
        return [index for index in indices if not self.sample_path(index).is_file()]

    def finish(self, skipped: Mapping[int, str], failed: Mapping[int, str], facts: Mapping) -> dict:
        """Write the complete manifest; `skipped` and `failed` map row indices to reasons."""
        sizes = [file.stat().st_size for file in self.sample_files()]
        self.manifest.update(
            complete=True,
            samples=len(sizes),
            bytes=sum(sizes),
            skipped=_by_reason(skipped),
            failed=_by_reason(failed),
            **facts,
        )
        write_json_atomic(self.path / MANIFEST, self.manifest)
        return self.manifest


def _by_reason(rows: Mapping[int, str]) -> dict[str, dict]:
    reasons: dict[str, list[int]] = {}
    for index, reason in sorted(rows.items()):
        reasons.setdefault(reason, []).append(index)
    return {reason: {"count": len(indices), "rows": indices} for reason, indices in sorted(reasons.items())}


def read_manifest(folder: Path) -> dict:
    """What made the data in a folder; empty where no manifest says it.

    Raises:
        ValueError: the file is not a manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    manifest = read_json(path)
    target, arguments = manifest.get("target", NO_TARGET), manifest.get("arguments")
    if not isinstance(arguments, dict) or not all(isinstance(one, PLAIN) for one in arguments.values()):
        raise ValueError(f"{path}: not a manifest of data generation (no arguments, or others than plain values)")
    if not isinstance(arguments.get("model"), str | None):
        raise ValueError(f"{path}: not a manifest of data generation (its model is {arguments['model']!r:.60})")
    told = isinstance(target, dict) and target.keys() == NO_TARGET.keys()
    if not told or not all(isinstance(one, str | None) for one in target.values()):
        raise ValueError(f"{path}: not a manifest of data generation (its target is {target!r:.60})")
    return manifest


def batches_of(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    """Batches by row index alone, whatever the number of workers and whatever exists already."""
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def share(batches: Sequence, worker: int, workers: int) -> Sequence:
    """The contiguous part of worker 0 … workers-1."""
    return batches[len(batches) * worker // workers : len(batches) * (worker + 1) // workers]
