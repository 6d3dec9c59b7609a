"""Which target has made the data: what a manifest says of it, so that features of two targets are never mixed."""

import torch
from transformers import PretrainedConfig

from vispec.model.loading import load_config
from vispec.weights_digest import target_revision


def identify_target(model: str, dtype: str) -> dict[str, str | None]:
    """What names a target for good.

    Args:
        model: folder or hub id.
        dtype: as --dtype says it.

    Returns:
        model; revision, see `target_revision`; dtype, None where the config does not say it.
    """
    config = load_config(model)
    found = dtype_of(config, dtype)
    named = found and str(found).removeprefix("torch.")
    return {"model": model, "revision": target_revision(model, config), "dtype": named}


def dtype_of(config: PretrainedConfig, dtype: str) -> torch.dtype | None:
    """What `dtype` is for a target; None for "auto" where its config does not say it."""
    if dtype != "auto":
        return getattr(torch, dtype)
    # the config's key has a new name in transformers 5, which older versions carry along as it is written
    found = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    found = getattr(torch, found.removeprefix("torch."), None) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else None
