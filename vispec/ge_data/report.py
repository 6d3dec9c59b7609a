"""The end of a run: what was skipped and why, and what a sample takes on disk."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
    from transformers import AutoConfig

    from vispec.ge_data.target_identity import dtype_of

    config = AutoConfig.from_pretrained(model)
    found = dtype_of(config, dtype) or torch.bfloat16  # where the config says nothing the smaller dtype is fair
    count = 1 if stage == "text" else 2
    return FullMatrices(count, count, config.get_text_config().hidden_size, found.itemsize)


def skip_file(folder: RunFolder, worker: int) -> Path:
    """Where a worker lists the rows that it skipped."""
    return folder.path / "logs" / f"skipped_{worker}.json"


def read_skipped(folder: RunFolder, workers: int) -> dict[int, str]:
    """Reasons by row, of all workers."""
    skipped: dict[int, str] = {}
    for worker in range(workers):
        found = json.loads(skip_file(folder, worker).read_text(encoding="utf-8"))
        skipped.update({int(index): reason for index, reason in found.items()})
    return skipped


def report(folder: RunFolder, rows: int, skipped: Mapping[int, str], full: FullMatrices) -> None:
    """Complete the manifest and print its numbers."""
    lengths = [read_length(path) for path in folder.sample_files()]
    reference = sum(full.bytes(length) for length in lengths)
    manifest = folder.finish(skipped, {"rows": rows, "tokens": sum(lengths), "reference_bytes": reference})
    count = manifest["samples"]
    print(f"{folder.path}: {count} samples of {rows} rows, {manifest['bytes']:,} bytes")
    if count:
        ours, theirs = manifest["bytes"] / count, reference / count
        kept = "features" if full.matrices == 1 else "features and embeddings"
        print(
            f"  {ours:,.0f} bytes each; the reference's full (tokens, {full.width}) {kept} of the same samples: "
            f"{theirs:,.0f} bytes each; ratio {ours / theirs:.3g}"
        )
    for reason, entry in manifest["skipped"].items():
        shown = ", ".join(map(str, entry["rows"][:8])) + (", …" if entry["count"] > 8 else "")
        print(f"  skipped, {reason}: {entry['count']} (rows {shown})")
