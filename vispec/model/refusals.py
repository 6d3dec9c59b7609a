"""Targets that cannot decode trees, refused by name when they are handed over: each with the one line that says why."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from vispec.model.recurrent import known_states
from vispec.model.windows import KINDS

DECODER_INPUTS = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")
"""What a text decoder is called with after the prompt."""
MERGES_ITSELF = ("pixel_values", "image_pixel_values", "image_embeds", "image_encoder_embeddings", "protein_input_ids")
"""Inputs of text decoders that turn images into rows, or attend to them, themselves."""
STATES = {"linear_attention": "linear-attention", "conv": "convolution", "mamba": "Mamba", "recurrent": "recurrent"}
"""Kinds of layers that keep no keys and values, but one state of all the text so far."""


def refuse_layers(model: PreTrainedModel, decoder: nn.Module) -> None:
    """Raises ValueError where the config names layers of kinds that are not known, or no number of positions."""
    name, text_config = type(model).__name__, model.config.get_text_config()
    known = KINDS | known_states(decoder)
    kinds = set(getattr(text_config, "layer_types", None) or ()) - known
    states = sorted(STATES[kind] for kind in kinds & set(STATES))
    if states:
        raise ValueError(
            f"{name} has {' and '.join(states)} layers, which keep one state of the whole text; the way back to an "
            "earlier one is known only of gated delta nets as in Qwen3.5 and of short convolutions as in LFM2"
        )
    if kinds:
        found, fitting = ", ".join(sorted(kinds)), ", ".join(sorted(known))
        raise ValueError(f"{name} has {found} layers; tree decoding knows {fitting}")
    if getattr(text_config, "max_position_embeddings", None) is None:
        raise ValueError(f"{name} does not say how many positions it has: no max_position_embeddings in its config")


def refuse_decoder(model: PreTrainedModel, decoder: nn.Module, lm_head: nn.Module | None) -> None:
    """After the prompt the text decoder is called alone, with embeddings: images must have become rows among them.

    Raises:
        ValueError: they have not, or the decoder cannot be called so.
    """
    name, kind = type(model).__name__, type(decoder).__name__
    takes = inspect.signature(type(decoder).forward).parameters
    if getattr(model.config.get_text_config(), "cross_attention_layers", None) or "cross_attention_states" in takes:
        raise ValueError(f"{name} reads its images through cross-attention layers, which tree decoding does not do yet")
    own = next((part for part in MERGES_ITSELF if part in takes), None)
    if own is not None:
        raise ValueError(
            f"{name} merges images inside its text decoder {kind} (which takes {own}), which tree decoding does not "
            "do yet"
        )
    whole = inspect.signature(type(model).forward).parameters
    if "past_key_values" not in whole and not any(part.kind is part.VAR_KEYWORD for part in whole.values()):
        raise ValueError(f"{name} does not hand keys and values to its text decoder (it takes no past_key_values)")
    if not getattr(model, "_supports_cache_class", True):  # Fuyu under transformers 4
        raise ValueError(f"{name} takes its keys and values as tuples, which tree decoding does not do")
    missing = [part for part in DECODER_INPUTS if part not in takes]
    if missing:
        raise ValueError(f"{name}: its text decoder {kind} does not take {', '.join(missing)}")
    if lm_head is None:
        raise ValueError(f"{name} has no output head (get_output_embeddings() is None)")
    attention = type(getattr(decoder.layers[0], "self_attn", None)).__name__
    if "Flash" in attention:  # older transformers choose the class of a layer when the model is built
        raise ValueError(f"{attention} cannot take a tree mask: load the target with attn_implementation='sdpa'")


@contextmanager
def naming_config(model: PreTrainedModel) -> Iterator[None]:
    """Around a prompt's pass: where code of transformers trips over an odd value of the config, one line says so.

    Raises:
        ValueError: for whatever was raised but for want of memory.
    """
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{type(model).__name__} cannot read the prompt; does its config fit? ({type(error).__name__}: {reason})"
        ) from error


def refuse_not_finite(name: str, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises ValueError at the first tensor with numbers that are not finite, which would be decoded with all the same.

    Args:
        name: of their owner.
        weights: names and tensors; those without memory are passed over.
    """
    for key, weight in weights:
        if weight.is_floating_point() and weight.numel() and not weight.is_meta:
            least, most = torch.aminmax(weight.detach())
            if not (least.isfinite() and most.isfinite()):
                raise ValueError(f"{name}: {key} has numbers that are not finite")
