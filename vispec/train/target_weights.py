"""Of the target, training needs two tables only: the token embedding and the output head."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import safe_open

from vispec.files import read_json
from vispec.model.hub_files import CONFIG, INDEX, PICKLED, PICKLED_INDEX, SAFETENSORS, find_file
from vispec.model.target_files import HEAD, check_fetched, check_safetensors, weight_map

EMBEDDING = "embed_tokens.weight"
"""Ends the embedding's name, whatever module a family or a version of transformers puts it in."""


def read_tables(basepath: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and output head, each (V, H), from a folder or a hub id; no other tensor is loaded.

    With tied embeddings both are the same tensor.

    Raises:
        ValueError: a file or a tensor cannot be found, or is broken.
    """
    files = _weight_files(basepath)
    embedding_name = _only(files, EMBEDDING, basepath)
    head_name = _only(files, HEAD, basepath, optional=True)
    embedding = _read(files[embedding_name], embedding_name)
    if head_name is not None:
        return embedding, _read(files[head_name], head_name)
    if not _is_tied(basepath):
        raise ValueError(f"{basepath}: no tensor {HEAD}, and the config does not tie it to the embedding")
    return embedding, embedding


def count_layers(basepath: str) -> int:
    """Layers of the target's text decoder."""
    from vispec.model.loading import load_config

    return load_config(basepath).get_text_config().num_hidden_layers


def tables_digest(*tables: torch.Tensor) -> str:
    """What tells tables from others: a hash of their dtypes, shapes and numbers."""
    digest = hashlib.blake2b(digest_size=8)
    for table in tables:
        digest.update(f"{table.dtype} {tuple(table.shape)}".encode())
        digest.update(table.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _weight_files(basepath: str) -> dict[str, Path]:
    """The file of each tensor, loaded lazily from the hub."""
    for all_names, alone in ((INDEX, SAFETENSORS), (PICKLED_INDEX, PICKLED)):
        index = find_file(basepath, all_names)
        if index is not None:
            # the other files need not be there
            ours = {name: place for name, place in weight_map(index).items() if name.endswith((EMBEDDING, HEAD))}
            return {name: _shard(basepath, place) for name, place in ours.items()}
        single = find_file(basepath, alone)
        if single is not None:
            return dict.fromkeys(_names(single), single)
    raise ValueError(f"{basepath}: none of {INDEX}, {SAFETENSORS}, {PICKLED_INDEX}, {PICKLED} there")


def _shard(basepath: str, name: str) -> Path:
    path = find_file(basepath, name)
    if path is None:
        raise ValueError(f"{basepath}: {name} is missing")
    return path


def _only(files: dict[str, Path], ending: str, basepath: str, optional: bool = False) -> str | None:
    """The one tensor name that is `ending` or ends with it as its last modules."""
    found = [name for name in files if name == ending or name.endswith("." + ending)]
    if len(found) == 1:
        return found[0]
    if not found and optional:
        return None
    what = ", ".join(found) if found else "none"
    raise ValueError(f"{basepath}: expected one tensor that ends with {ending}, found {what}")


def _names(path: Path) -> Iterable[str]:
    if path.suffix != ".safetensors":
        return _unpickled(path)
    check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        return file.keys()


def _read(path: Path, name: str) -> torch.Tensor:
    if path.suffix == ".safetensors":
        check_safetensors(path)
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    found = _unpickled(path).get(name)
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{path}: {name} is not in it, or no tensor")
    return found.clone()


def _unpickled(path: Path) -> dict:
    """The tensors of a .bin file, which stay on disk until they are used."""
    check_fetched(path)
    try:
        # older files are no archives, and read whole
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path)))
    except Exception as error:  # its reader raises many types for a broken file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: cannot be read as weights ({reason})") from None


def _is_tied(basepath: str) -> bool:
    path = find_file(basepath, CONFIG)
    config = read_json(path) if path else {}
    # what both levels leave out is tied: that is the default of transformers
    inner = config.get("text_config") or {}
    return config.get("tie_word_embeddings", inner.get("tie_word_embeddings", True))
