"""The end of a run: what was skipped and why, and what a sample takes on disk."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vispec.cli import DONE, ERROR, WITH_FAILURES
from vispec.files import read_json
from vispec.ge_data.run_folder import RunFolder
from vispec.ge_data.sample_file import read_length

ID_BYTES, MASK_BYTES = 8, 1


@dataclass(frozen=True)
class FullMatrices:
    """What the published code keeps of a sample of L tokens: (L, H) matrices in the target's dtype, ids and masks."""

    matrices: int
    masks: int
    width: int
    """H, numbers of a row."""
    item: int
    """Bytes of a number."""

    def bytes(self, length: int) -> int:
        return length * (self.matrices * self.width * self.item + ID_BYTES + self.masks * MASK_BYTES)


def full_matrices(stage: str, model: str, dtype: str) -> FullMatrices:
    """Features for text; features and embeddings, and an image mask, for images.

    Args:
        model: the target, folder or hub id; its config is read.
        dtype: as --dtype says it.
    """
    import torch

    from vispec.ge_data.target_identity import dtype_of
    from vispec.model.loading import load_config

    config = load_config(model)
    found = dtype_of(config, dtype) or torch.bfloat16  # where the config says nothing the smaller dtype is fair
    count = 1 if stage == "text" else 2
    width = config.get_text_config().hidden_size
    if type(width) is not int:
        raise ValueError(f"{model}: config.json: hidden_size is {width!r:.60}, expected a number")
    return FullMatrices(count, count, width, found.itemsize)


def rows_file(folder: RunFolder, worker: int) -> Path:
    """Where a worker lists the rows without a sample."""
    return folder.path / "logs" / f"rows_{worker}.json"


def read_rows(folder: RunFolder, workers: int) -> tuple[dict[int, str], dict[int, str]]:
    """Reasons by row, of all workers: of those that were skipped, and of those that failed."""
    skipped: dict[int, str] = {}
    failed: dict[int, str] = {}
    for worker in range(workers):
        found = read_json(rows_file(folder, worker))
        for rows, kind in ((skipped, "skipped"), (failed, "failed")):
            rows.update({int(index): reason for index, reason in found[kind].items()})
    return skipped, failed


def report(
    folder: RunFolder, rows: int, skipped: Mapping[int, str], failed: Mapping[int, str], full: FullMatrices
) -> int:
    """Complete the manifest and print its numbers; returns an exit code."""
    lengths = [read_length(path) for path in folder.sample_files()]
    reference = sum(full.bytes(length) for length in lengths)
    manifest = folder.finish(skipped, failed, {"rows": rows, "tokens": sum(lengths), "reference_bytes": reference})
    count = manifest["samples"]
    print(f"{folder.path}: {count} samples of {rows} rows, {manifest['bytes']:,} bytes")
    if count:
        ours, theirs = manifest["bytes"] / count, reference / count
        kept = "features" if full.matrices == 1 else "features and embeddings"
        print(
            f"  {ours:,.0f} bytes each; the reference's full (tokens, {full.width}) {kept} of the same samples: "
            f"{theirs:,.0f} bytes each; ratio {ours / theirs:.3g}"
        )
    for kind in ("skipped", "failed"):
        for reason, entry in manifest[kind].items():
            shown = ", ".join(map(str, entry["rows"][:8])) + (", …" if entry["count"] > 8 else "")
            print(f"  {kind}, {reason}: {entry['count']} (rows {shown})")
    if failed:
        print(f"error: {len(failed)} row(s) failed; the same command tries them again", file=sys.stderr)
    if not count:
        print(f"error: {folder.path}: none of {rows} rows became a sample", file=sys.stderr)
        return ERROR
    return WITH_FAILURES if failed else DONE
