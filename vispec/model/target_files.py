"""The files of a target's folder, looked at before transformers reads them and where it has failed to.

transformers goes on without a generation config that it cannot read, and says of most broken files neither which one
it was nor what to do.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import transformers
from packaging import version
from safetensors import safe_open

from vispec.files import LFS_POINTER, read_json
from vispec.model.arguments import number, whole
from vispec.model.hub_files import INDEX, SAFETENSORS

HEAD = "lm_head.weight"


def check_files(path: str, subfolder: str | None = None) -> None:
    """Raises ValueError with the name of a file that cannot be what it is called; a hub id is left to its hub."""
    folder = Path(path, subfolder or "")
    if not folder.is_dir():
        return
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    for file in _weight_files(folder):
        check_safetensors(file)


def check_numbers(path: str, config) -> None:
    """Raises ValueError at a number of a text config that transformers builds a model from, and cannot compute with."""
    try:
        whole("num_hidden_layers", config.num_hidden_layers, 1)
        if getattr(config, "max_position_embeddings", None) is not None:
            whole("max_position_embeddings", config.max_position_embeddings, 1)
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(config, name, 1)
            if not (value is None and name == "rope_theta") and number(name, value) <= 0:
                raise ValueError(f"{name} must be above 0, found {value}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: config.json: {error}") from None


def own_head(path: str, subfolder: str | None) -> torch.Tensor | None:
    """The output head (V, H) in the files of a folder; None where they have none."""
    folder = Path(path, subfolder or "")
    for file in _weight_files(folder) if folder.is_dir() else ():
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # it is no mapping
                if name == HEAD or name.endswith("." + HEAD):
                    return tensors.get_tensor(name)
    return None


def unread_rope(values: Mapping, config) -> str | None:
    """What a config of transformers 5 says about positions and an older version does not read; None for nothing.

    Args:
        values: of the config file.
        config: as the installed version has read it.
    """
    if version.parse(transformers.__version__).major >= 5:
        return None
    told = next((part["rope_parameters"] for part in (values.get("text_config"), values)
                 if isinstance(part, dict) and isinstance(part.get("rope_parameters"), dict)), {})  # fmt: skip
    text = config.get_text_config()
    scaling = getattr(text, "rope_scaling", None) or {}
    read = {"rope_theta": getattr(text, "rope_theta", None), **scaling}
    read.setdefault("rope_type", "default")
    unread = [f"{name} {value!r}" for name, value in told.items() if value is not None and read.get(name) != value]
    return ", ".join(unread) or None


def explained(error: BaseException, values: Mapping) -> str:
    """What an error of transformers while loading says, with the config's key that it is about.

    Args:
        values: of the config file.
    """
    told = str(error) if isinstance(error, ValueError | OSError | ImportError) else f"{type(error).__name__}: {error}"
    installed = transformers.__version__
    if isinstance(error, KeyError) and error.args:
        key = next((key for key, value in _entries(values) if value == error.args[0]), None)
        if key is not None:
            told = f"config.json: {key} {error.args[0]!r} is not known to transformers {installed}"
    saved = values.get("transformers_version")
    if isinstance(saved, str) and _is_newer(saved, installed):
        told = f"its config was saved by transformers {saved}, {installed} is installed; {told}"
    return told


def _is_newer(saved: str, installed: str) -> bool:
    try:
        return version.parse(saved) > version.parse(installed)
    except version.InvalidVersion:
        return False


def _entries(values: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _weight_files(folder: Path) -> list[Path]:
    """Those that transformers would read; none where the weights are stored in another way."""
    if (folder / SAFETENSORS).is_file():
        return [folder / SAFETENSORS]
    index = folder / INDEX
    if not index.is_file():
        return []
    names = sorted(set(weight_map(index).values()))
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file, but {INDEX} names it: download it again")
    return [folder / name for name in names]


def weight_map(index: Path) -> dict[str, str]:
    """For each tensor the file beside `index` that has it; raises ValueError where the index does not say that."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{index}: no weight_map, which says in which file each tensor is: download it again")
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: {name} is no file beside it")
    return places


def check_fetched(file: Path) -> None:
    """Raises ValueError where a file of weights is empty, or a pointer to itself."""
    with open(file, "rb") as content:
        start = content.read(len(LFS_POINTER))
    if not start:
        raise ValueError(f"{file}: empty: download it again")
    if start == LFS_POINTER:
        raise ValueError(f"{file}: a git-lfs pointer, not the weights: run `git lfs pull` in that folder")


def check_safetensors(file: Path) -> None:
    """Raises ValueError where a file of weights is empty, cut off, or a pointer to itself."""
    check_fetched(file)
    try:
        with safe_open(file, framework="pt"):
            pass
    except Exception as error:  # its reader raises a type of its own, which differs between versions
        raise ValueError(f"{file}: cut off or damaged ({error}): download it again") from None
