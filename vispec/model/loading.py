"""Loading a target from a folder or a hub id, by transformers."""

import logging
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike

import torch
import transformers
from packaging import version
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from vispec.model.arguments import of_kind
from vispec.model.hub_files import hub_options
from vispec.model.target_files import check_files, check_numbers, explained, own_head, unread_rope

logger = logging.getLogger("vispec")


def load_target(
    path: str, torch_dtype: str | torch.dtype = "auto", device_map: str | dict | None = None, **kwargs
) -> PreTrainedModel:
    """Load a VLM by transformers from a folder or a hub id; `kwargs` go to its `from_pretrained`.

    Raises:
        ValueError: transformers cannot load it, or would have to make up weights that its files lack.
    """
    if not isinstance(path, str | PathLike):
        raise TypeError(f"base_model_path must be a folder, a hub id or a loaded model, found {path!r:.60}")
    attention = kwargs.get("attn_implementation")
    if attention not in (None, "sdpa", "eager"):
        logger.warning("attention %r cannot take a tree mask, sdpa is used instead", attention)
        kwargs["attn_implementation"] = "sdpa"
    # the argument has a new name since transformers 4.56
    dtype_name = "dtype" if version.parse(transformers.__version__) >= version.parse("4.56") else "torch_dtype"
    _check_device_map(device_map)
    check_files(path, kwargs.get("subfolder"))
    # what does not fit is named below, which transformers 5 leaves to its log
    kwargs["ignore_mismatched_sizes"] = True
    with _one_line_errors(path, kwargs) as values:
        _refuse_parts(values)
        torch_dtype = _as_saved(values) if torch_dtype == "auto" else torch_dtype
        model, info = AutoModelForImageTextToText.from_pretrained(
            path, **{dtype_name: torch_dtype}, device_map=device_map, output_loading_info=True, **kwargs
        )
    missing = sorted(info["missing_keys"])
    if missing:
        named = textwrap.shorten(", ".join(missing), 200, placeholder=" …")
        raise ValueError(f"{path}: the target's files lack {len(missing)} of its tensors ({named})")
    # names alone in older versions, (name, shape, shape) in newer ones
    misshapen = sorted(entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"])
    if misshapen:
        named = textwrap.shorten(", ".join(misshapen), 200, placeholder=" …")
        raise ValueError(f"{path}: config.json asks for other shapes than those of its weights ({named})")
    check_numbers(path, model.config.get_text_config())
    _check_positions(path, values, model)
    _check_tables(path, model, kwargs.get("subfolder"))
    return model


def load_outline(path: str) -> PreTrainedModel:
    """A VLM as its config has it, on the meta device: no weight is read, and there is no memory for any.

    Raises:
        ValueError: transformers cannot build it.
    """
    check_files(path)
    config = load_config(path)
    with _one_line_errors(path, {}), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def load_config(path: str) -> PretrainedConfig:
    """A target's config, from a folder or a hub id.

    Raises:
        ValueError: transformers cannot read it.
    """
    with _one_line_errors(path, {}) as values:
        _refuse_parts(values)
        config = AutoConfig.from_pretrained(path)
        if not isinstance(config.get_text_config(), PretrainedConfig):
            raise ValueError("its text_config is not read")
    check_numbers(path, config.get_text_config())
    return config


def one_dtype(torch_dtype: str | torch.dtype, dtype: str | torch.dtype | None) -> str | torch.dtype:
    """The dtype that was asked for, by either of its names."""
    named = [getattr(torch, str(value), value) for value in (torch_dtype, dtype)]
    for name, value, found in zip(("torch_dtype", "dtype"), named, (torch_dtype, dtype), strict=True):
        if not isinstance(value, torch.dtype) and found not in ("auto", None):
            raise TypeError(f"{name} must be 'auto' or a dtype of torch, found {found!r}")
    if dtype is None or torch_dtype == "auto" or named[0] == named[1]:
        return torch_dtype if dtype is None else dtype
    raise ValueError(f"torch_dtype and dtype are two names of one thing, found {torch_dtype} and {dtype}")


@contextmanager
def _one_line_errors(path: str, kwargs: Mapping) -> Iterator[dict]:
    """Gives the values of a target's config file, whose errors become one line.

    transformers explains over several lines and lists every model it knows; the beginning says what is wrong. For a
    file that is wrong it raises whatever its code trips over.
    """
    values: dict = {}
    try:
        values.update(PretrainedConfig.get_config_dict(path, **hub_options(kwargs))[0])
        yield values
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = textwrap.shorten(explained(error, values), 200, placeholder=" …")
        raise ValueError(f"{path}: transformers cannot load it as a target ({reason})") from error


def _check_device_map(device_map: str | dict | None) -> None:
    if device_map == {}:
        raise ValueError("device_map is empty, so it says no place")
    places = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    for place in places:
        of_kind("device_map", place, str, int, torch.device)
    if any(str(place).startswith("cuda") for place in places) and not torch.cuda.is_available():
        raise ValueError(f"device_map {device_map}: torch sees no GPU here")


def _check_positions(path: str, values: Mapping, model: PreTrainedModel) -> None:
    unread = unread_rope(values, model.config)
    if unread is not None:
        raise ValueError(
            f"{path}: its config was saved by transformers {values.get('transformers_version', '5')}, and "
            f"{transformers.__version__}, which is installed, does not read its rope_parameters ({unread}): install "
            "transformers 5"
        )


def _check_tables(path: str, model: PreTrainedModel, subfolder: str | None) -> None:
    """Embedding and output head must be in memory, and be those of the files."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, table in (("embedding", embedding), ("output head", head)):
        if table is not None and table.weight.is_meta:
            raise ValueError(f"{path}: device_map puts the {name} on disk, where decoding cannot use it")
    if head is None or head.weight is not embedding.weight:
        return
    own = own_head(path, subfolder)
    if own is not None and not torch.equal(own.to(head.weight), head.weight):
        raise ValueError(
            f"{path}: its config ties the output head to the embedding, and transformers {transformers.__version__} "
            "decodes with that, but its files have another lm_head.weight: say tie_word_embeddings false in its "
            "config, or remove that tensor"
        )


def _as_saved(values: Mapping) -> str | torch.dtype:
    """What "auto" is: newer versions of transformers save the dtype under another name, which older ones pass over."""
    return one_dtype(values["dtype"].removeprefix("torch."), None) if isinstance(values.get("dtype"), str) else "auto"


def has_parts(values: Mapping) -> bool:
    """Whether values of a config file are those of a VLM; the config of a published draft head says that it is one."""
    return any(part in values for part in _parts(values))


def _parts(values: Mapping) -> list[str]:
    """The parts that configs of this kind have."""
    name = values.get("model_type")
    kind = CONFIG_MAPPING[name] if isinstance(name, str) and name in CONFIG_MAPPING else None
    return sorted(getattr(kind, "sub_configs", ()))


def _refuse_parts(values: Mapping) -> None:
    """What a config's file leaves out or misspells, and transformers would go on without or at full default size."""
    parts = _parts(values)
    if parts and not has_parts(values):
        raise ValueError(f"its config has none of {', '.join(parts)}; is it a draft head?")
    for part in (*parts, "quantization_config"):
        if not isinstance(values.get(part, {}), dict):
            raise ValueError(f"config.json: {part} is {values[part]!r}, expected an object")
    quantization = values.get("quantization_config", {})
    if "quant_method" in quantization and not AutoHfQuantizer.supports_quant_method(quantization):
        method = quantization["quant_method"]
        raise ValueError(
            f"config.json: quantization_config.quant_method {method!r} is not known to transformers "
            f"{transformers.__version__}"
        )
