"""Which target has made the data: what a manifest says of it, so that features of two targets are never mixed."""

import torch
from transformers import AutoConfig, PretrainedConfig

from vispec.model.target_files import load_part
from vispec.weights_digest import target_revision


def identify_target(model: str, dtype: str) -> dict[str, str | None]:
    """What names a target for good.

    Args:
        model: folder or hub id.
        dtype: as --dtype says it.

    Returns:
        model; revision, see `target_revision`; dtype, None where the config does not say it.
    """
    config = load_part(AutoConfig, model)
    found = dtype_of(config, dtype)
    named = found and str(found).removeprefix("torch.")
    return {"model": model, "revision": target_revision(model, config), "dtype": named}


def dtype_of(config: PretrainedConfig, dtype: str) -> torch.dtype | None:
    """What `dtype` is for a target; None for "auto" where its config does not say it."""
    if dtype != "auto":
        return getattr(torch, dtype)
    # the config's key has a new name in transformers 5
    return getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
