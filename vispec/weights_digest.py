"""Which weights a name stands for: a digest of all bytes that are read of a model.

A model that was trained on, or joined with an adapter, in its folder keeps its name, its sizes and most of its bytes.
Reading gigabytes takes a while, so the digests of large files are remembered by path, size and time of change.
"""

import hashlib
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from vispec.remembered import recall, remember

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FOLDER = "files-sha256:"
"""Begins the revision of a target in a folder."""
READ_BESIDE = (
    "config.json", "generation_config.json", "*.index.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*",
)  # fmt: skip
"""What says, beside the weights, how a target reads a prompt and when its answer ends."""
LARGE = 2**20
"""Bytes from which a file's digest is remembered."""
SETTLED = 2.0
"""Seconds after its last change from which a file's time tells it from the next change."""
REMEMBERED = "digests.json"


def target_revision(path: str, config: "PretrainedConfig | None" = None) -> str | None:
    """What tells a target from others of the same name: the digest of a folder, or the hub's commit.

    Args:
        path: folder or hub id.
        config: as it was read, which is what knows the commit; without it, None is returned for a hub id.
    """
    return folder_digest(Path(path)) if Path(path).is_dir() else getattr(config, "_commit_hash", None)


def folder_digest(folder: Path) -> str:
    """`FOLDER` and the SHA-256 of a target's weights and of what is read beside them."""
    # as transformers has it: what is pickled is read where there is nothing else
    weights = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    beside = {path for pattern in READ_BESIDE for path in folder.glob(pattern) if path.is_file()}
    lines = [f"{path.name} {file_sha256(path)}\n" for path in sorted([*weights, *beside])]
    return FOLDER + hashlib.sha256("".join(lines).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    path = path.resolve()
    found = path.stat()
    return _sha256(path, found.st_size, found.st_mtime_ns)


@lru_cache
def _sha256(path: Path, size: int, modified: int) -> str:
    large, name = size >= LARGE, f"{path} {size} {modified}"
    known = recall(REMEMBERED).get(name) if large else None
    if isinstance(known, str):
        return known
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while part := content.read(1 << 24):
            digest.update(part)
    if large and time.time() - modified / 1e9 > SETTLED:
        remember(REMEMBERED, {name: digest.hexdigest()})
    return digest.hexdigest()
