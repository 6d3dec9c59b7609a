"""What a model of transformers is made of and says of itself, wherever its family and version keep it."""

import logging

import torch
from torch import nn
from transformers import PreTrainedModel

LARGEST_PASS = 1024
"""Tokens of a pass behind the prompt, where it matters how many they may be."""

logger = logging.getLogger("vispec")


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """The module with the decoder layers and the token embedding, wherever the family hangs it."""
    module = model
    while not (hasattr(module, "layers") and hasattr(module, "embed_tokens")):
        name = next((n for n in ("language_model", "text_model", "model") if hasattr(module, n)), None)
        if name is None:
            raise ValueError(f"{type(model).__name__}: no text decoder with `layers` and `embed_tokens` was found")
        module = getattr(module, name)
    return module


def find_rope_owner(model: PreTrainedModel) -> nn.Module | None:
    """The module that remembers M-RoPE's offset of the last prompt; it moved between versions of transformers."""
    return next((module for module in model.modules() if hasattr(module, "rope_deltas")), None)


def max_positions(text_config) -> int:
    """How many positions the text may have."""
    if not getattr(text_config, "attn_temperature_tuning", False):
        return text_config.max_position_embeddings
    # Llama 4 scales queries from a place on, and counts places by slots: a tree's nodes are not where it thinks
    return max(0, min(text_config.max_position_embeddings, text_config.floor_scale - 1 - LARGEST_PASS))


def position_axes(decoder: nn.Module, text_config) -> int:
    """Rows of the positions that a decoder takes: one for each section of M-RoPE's angles, else one."""
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    sections = getattr(getattr(decoder, "rotary_emb", None), "mrope_section", None) or rope.get("mrope_section")
    return len(sections) if sections else 1


def use_maskable_attention(model: PreTrainedModel) -> None:
    """Trees need a 4-D mask: sdpa and eager attention take one, others do not."""
    text_config = model.config.get_text_config()
    chosen = getattr(text_config, "_attn_implementation", "sdpa")
    if chosen not in ("sdpa", "eager"):
        logger.warning("attention %r cannot take a tree mask, the text decoder uses sdpa instead", chosen)
        for module in model.modules():
            config = getattr(module, "config", None)
            if config is text_config:
                config._attn_implementation = "sdpa"


def eos_token_ids(model: PreTrainedModel) -> list[int]:
    """Tokens that end an answer.

    Raises:
        ValueError: the generation config names something else.
    """
    eos = model.generation_config.eos_token_id
    if eos is None:
        return []
    try:
        return [int(e) for e in eos] if isinstance(eos, list | tuple) else [int(eos)]
    except (TypeError, ValueError):
        raise ValueError(f"the target's generation config: eos_token_id is {eos!r:.60}, expected ids") from None


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes, also when accelerate has placed it, as a whole or part by part."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((device for device in devices if device is not None), None)
    return torch.device(device) if device is not None else next(module.parameters()).device
