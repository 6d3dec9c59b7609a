"""Loading a target from a folder or a hub id, by transformers."""

import logging
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import transformers
from packaging import version
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

logger = logging.getLogger("vispec")

SHARED_HUB_OPTIONS = ("token", "cache_dir", "local_files_only")
"""Arguments of a download that hold for every repository; the others below belong to one."""
HUB_OPTIONS = (*SHARED_HUB_OPTIONS, "revision", "subfolder")


def load_target(
    path: str, torch_dtype: str | torch.dtype = "auto", device_map: str | dict | None = None, **kwargs
) -> PreTrainedModel:
    """Load a VLM by transformers from a folder or a hub id; `kwargs` go to its `from_pretrained`.

    Raises:
        ValueError: transformers cannot load it, or would have to make up weights that its files lack.
    """
    attention = kwargs.get("attn_implementation")
    if attention not in (None, "sdpa", "eager"):
        logger.warning("attention %r cannot take a tree mask, sdpa is used instead", attention)
        kwargs["attn_implementation"] = "sdpa"
    # the argument has a new name since transformers 4.56
    dtype_name = "dtype" if version.parse(transformers.__version__) >= version.parse("4.56") else "torch_dtype"
    with _one_line_errors(path):
        _refuse_draft_head(path, kwargs)
        model, info = AutoModelForImageTextToText.from_pretrained(
            path, **{dtype_name: torch_dtype}, device_map=device_map, output_loading_info=True, **kwargs
        )
    missing = sorted(info["missing_keys"])
    if missing:
        named = textwrap.shorten(", ".join(missing), 200, placeholder=" …")
        raise ValueError(f"{path}: the target's files lack {len(missing)} of its tensors ({named})")
    return model


def load_outline(path: str) -> PreTrainedModel:
    """A VLM as its config has it, on the meta device: no weight is read, and there is no memory for any.

    Raises:
        ValueError: transformers cannot build it.
    """
    with _one_line_errors(path):
        _refuse_draft_head(path, {})
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)


def one_dtype(torch_dtype: str | torch.dtype, dtype: str | torch.dtype | None) -> str | torch.dtype:
    """The dtype that was asked for, by either of its names."""
    named = [getattr(torch, str(value), value) for value in (torch_dtype, dtype)]
    for name, value, found in zip(("torch_dtype", "dtype"), named, (torch_dtype, dtype), strict=True):
        if not isinstance(value, torch.dtype) and found not in ("auto", None):
            raise TypeError(f"{name} must be 'auto' or a dtype of torch, found {found!r}")
    if dtype is None or torch_dtype == "auto" or named[0] == named[1]:
        return torch_dtype if dtype is None else dtype
    raise ValueError(f"torch_dtype and dtype are two names of one thing, found {torch_dtype} and {dtype}")


def hub_options(options: Mapping, names: Sequence[str] = HUB_OPTIONS) -> dict:
    """Those arguments of a `from_pretrained` that say where the files of a model are."""
    return {name: options[name] for name in names if name in options}


@contextmanager
def _one_line_errors(path: str) -> Iterator[None]:
    """transformers explains over several lines and lists every model it knows; the beginning says what is wrong."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" …")
        raise ValueError(f"{path}: transformers cannot load it as a target ({reason})") from error


def _refuse_draft_head(path: str, kwargs: Mapping) -> None:
    """The config of a published draft head says that it is a VLM; transformers would build one, at full size."""
    values, _ = PretrainedConfig.get_config_dict(path, **hub_options(kwargs))
    kind = CONFIG_MAPPING[values["model_type"]] if values.get("model_type") in CONFIG_MAPPING else None
    parts = sorted(getattr(kind, "sub_configs", ()))
    if parts and not any(part in values for part in parts):
        raise ValueError(f"its config has none of {', '.join(parts)}; is it a draft head?")
