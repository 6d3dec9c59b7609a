"""The settings of an answer file: what stays the same within it, and what it shares with files that stand beside it."""

import hashlib
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, NamedTuple

from vispec.cli import device_name
from vispec.evaluation.loading import Models, dtype_name
from vispec.evaluation.measure import Generation
from vispec.methods import GENERATE, VLM, method_of
from vispec.model.adaptive import parse_tree
from vispec.model.shape import AUTO, TreeShape
from vispec.weights_digest import file_sha256, target_revision

if TYPE_CHECKING:
    from vispec.model.spec_model import SpecModel

ARMS = "the arms cannot be compared"
TABLE, ROW = (f"the answers cannot stand in one {place}" for place in ("table", "row"))
"""What files with the same values of a setting are, and what is said of others."""


class Setting(NamedTuple):
    """What is known of a setting."""

    kinds: tuple[type, ...]
    """Of its value, as JSON gives it back."""
    shared: tuple[str, ...] = ()
    """Where files must have the same value: of ARMS, TABLE and ROW."""
    loaded: bool = False
    """Whether it may be that only loaded models tell it."""


SETTINGS = {
    "benchmark": Setting((str,), (ARMS,)),
    "data": Setting((str,), (ARMS,)),
    "benchmark_options": Setting((dict,), (ARMS,)),
    "method": Setting((str,)),
    "base_model": Setting((str,), (ARMS,)),
    "base_model_revision": Setting((str, NoneType), (ARMS, TABLE), loaded=True),
    "temperature": Setting((int, float), (ARMS,)),
    "dtype": Setting((str,), (ARMS, TABLE), loaded=True),
    "device": Setting((str,), (ARMS, TABLE), loaded=True),
    "device_type": Setting((str,), (ARMS, TABLE), loaded=True),
    "devices": Setting((int,), (ARMS, TABLE), loaded=True),
    "max_new_tokens": Setting((int,), (ARMS, TABLE)),
    "num_choices": Setting((int,), (ARMS, TABLE)),
    "generation_config": Setting((bool,), (ARMS, TABLE)),
    "prefix_cache": Setting((int,), (ARMS,)),
    "layers": Setting((str,), loaded=True),
    "spec_model": Setting((str,), (ROW,)),
    "spec_revision": Setting((str,)),
    "spec_subfolder": Setting((str,)),
    "spec_model_sha256": Setting((str, NoneType), (ROW,), loaded=True),
    "draft_vocab": Setting((str, NoneType), (ROW,), loaded=True),
    "draft_image_rows": Setting((int, float), (ROW,)),
    "asked_tree": Setting((str, list)),
    "tree": Setting((str, list), (ROW,), loaded=True),
    "tuned_on": Setting((dict,)),
    "skip_visual": Setting((int, float), (ROW,)),
}
LOADED = tuple(name for name, setting in SETTINGS.items() if setting.loaded)


def shared_by(what: str) -> tuple[str, ...]:
    """The settings that the files of ARMS, TABLE or ROW must share."""
    return tuple(name for name, setting in SETTINGS.items() if what in setting.shared)


def asked_settings(
    models: Models, method: str, benchmark: str, data: str, options: Mapping, generation: Generation, num_choices: int
) -> dict:
    """What is known of the settings of a method's answers before its models are loaded.

    Args:
        data: where the benchmark's questions come from.
        options: values of the benchmark's own flags.
    """
    settings = {
        "benchmark": benchmark,
        "data": data,
        "method": method,
        "base_model": _absolute(models.base_model_path),
        "temperature": generation.temperature,
        "max_new_tokens": generation.max_new_tokens,
        "num_choices": num_choices,
    }
    if Path(models.base_model_path).is_dir():  # a retrained target shows before minutes of loading
        settings["base_model_revision"] = target_revision(models.base_model_path)
    if generation.own_config:
        settings["generation_config"] = True
    if models.prefix_cache:
        settings["prefix_cache"] = models.prefix_cache
    if options:
        settings["benchmark_options"] = dict(options)
    if models.dtype != "auto":
        settings["dtype"] = models.dtype
    if method in models.drafting:
        if models.skip_visual is not None:
            settings["skip_visual"] = models.skip_visual
        settings["asked_tree"] = as_noted(models.tree_of(method))  # what a draft can fill of it may be less
        draft = models.drafts[method]
        if draft is not None:
            place = models.place_of(method)
            settings["spec_model"] = _absolute(draft)
            settings |= {f"spec_{name}": value for name, value in place.items()}
            if method_of(method) == VLM and models.draft_image_rows is not None:
                settings["draft_image_rows"] = models.draft_image_rows
            if Path(draft).is_dir():  # a retrained head as well
                settings["spec_model_sha256"] = _head_sha256(draft, place)
    return settings


def loaded_settings(model: "SpecModel", models: Models, method: str) -> dict:
    """What stands behind a method's answers, as a loaded model has it and not as flags asked for it.

    Returns:
        The target's revision, dtype, device (name), device_type, number of devices, and by which layers it decodes;
        with a draft also tree (total_token, depth and top_k, or the name of a rule, or AUTO), with a draft head
        draft_vocab (None where it proposes all tokens) and spec_model_sha256.
    """
    devices = list(dict.fromkeys(model.target.devices))
    settings = {
        "base_model_revision": target_revision(models.base_model_path, model.target.config),
        "dtype": dtype_name(model),
        "device": ", ".join(dict.fromkeys(map(device_name, devices))),
        "device_type": ", ".join(dict.fromkeys(device.type for device in devices)),
        "devices": len(devices),
    }
    if method != GENERATE:
        settings["layers"] = "lean" if model.target.lean else "stock"
    if model.draft is not None:
        settings["tree"] = as_noted(AUTO if model.tree == AUTO else model.shape)
    draft = models.drafts.get(method)
    if draft is not None:
        vocabulary = model.draft.draft_vocab
        settings["draft_vocab"] = None if vocabulary is None else _described(vocabulary.token_ids)
        settings["spec_model_sha256"] = _head_sha256(draft, models.place_of(method))
    return settings


def as_noted(tree: TreeShape | str) -> list[int] | str:
    """A tree as JSON gives it back: sizes as a list, else its name."""
    return list(astuple(tree)) if type(tree) is TreeShape else str(tree)


def noted_tree(noted: list[int] | str) -> TreeShape:
    """The tree of which this is a note; ValueError where it is of none."""
    return parse_tree(noted) if isinstance(noted, str) else TreeShape(*noted)


def _head_sha256(spec_model_path: str, place: Mapping[str, str]) -> str | None:
    """Tells a draft from a retrained one under the same name; None where it is on the hub in several files."""
    from vispec.model.hub_files import PICKLED, SAFETENSORS, find_file

    file = find_file(spec_model_path, SAFETENSORS, **place) or find_file(spec_model_path, PICKLED, **place)
    if file is None:
        return target_revision(str(Path(spec_model_path, place.get("subfolder", ""))))
    return file_sha256(file)


def _described(token_ids) -> str:
    """A draft vocabulary of ids (V',) by its size and content."""
    return f"{len(token_ids)} tokens, sha256 {hashlib.sha256(token_ids.cpu().numpy().tobytes()).hexdigest()}"


def _absolute(path: str) -> str:
    """A local folder by its full path, a hub id as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
