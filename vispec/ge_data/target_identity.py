"""Which target has made the data: what a manifest says of it, so that features of two targets are never mixed."""

import hashlib
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

FINGERPRINT = "sha256:"
"""Begins the revision of a target in a folder."""
SAMPLED = 2**20
"""Bytes at the beginning and at the end of a weight file that tell it from others."""


def identify_target(model: str, dtype: str) -> dict[str, str | None]:
    """What names a target for good.

    Args:
        model: folder or hub id.
        dtype: as --dtype says it.

    Returns:
        model; revision, the hub's commit or, of a folder, `fingerprint`; dtype, None where the config does not say it.
    """
    config = AutoConfig.from_pretrained(model)
    revision = fingerprint(Path(model)) if Path(model).is_dir() else getattr(config, "_commit_hash", None)
    found = dtype_of(config, dtype)
    return {"model": model, "revision": revision, "dtype": found and str(found).removeprefix("torch.")}


def dtype_of(config: PretrainedConfig, dtype: str) -> torch.dtype | None:
    """What `dtype` is for a target; None for "auto" where its config does not say it."""
    if dtype != "auto":
        return getattr(torch, dtype)
    # the config's key has a new name in transformers 5
    return getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)


def fingerprint(folder: Path) -> str:
    """SHA-256 of the config, the weights' index, and size, beginning and end of each weight file."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.index.json")]):
        digest.update(path.name.encode() + path.read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLED))
            file.seek(max(size - SAMPLED, 0))
            digest.update(file.read(SAMPLED))
    return f"{FINGERPRINT}{digest.hexdigest()[:16]}"
