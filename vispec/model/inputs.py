"""Which keyword arguments a prompt may come with: what the family's processor returns and the target's forward takes.

Everything else is refused, so that a misspelt option is not mistaken for a processor's output.
"""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches

import torch
from transformers import PreTrainedModel

from vispec.model.families import PER_TOKEN, image_token_id, video_token_id

BESIDE = (*PER_TOKEN, "second_per_grid_ts", "video_metadata")
"""Processors give them also to targets that do not take them; there they are dropped."""
VIDEO_INPUTS = ("pixel_values_videos", "video_grid_thw")

DECODING_SETS = frozenset(
    ("self", "inputs_embeds", "position_ids", "cache_position", "past_key_values", "rope_deltas", "use_cache")
    + ("mm_encoder_outputs",)  # images that generate() of transformers 5 has encoded
    + ("logits_to_keep", "num_logits_to_keep", "labels", "return_dict", "output_attentions", "output_hidden_states")
    + ("vision_feature_layer", "vision_feature_select_strategy")  # the config's: how many tokens an image has follows
)
"""What targets' forwards take besides a processor's outputs; none of it is a caller's to choose."""

INSTEAD = {"do_sample": "temperature (0 is greedy)"}
"""What transformers' generate() takes and is said in another way here."""


def prompt_inputs(arm: Callable, model: PreTrainedModel, input_ids: torch.Tensor, inputs: Mapping) -> dict:
    """Those keyword arguments of `arm` that the target's forward takes, without the absent ones.

    Args:
        arm: the method that was called; messages name it, hints come from its signature.
        model: the target.
        input_ids: (B, L).
        inputs: keyword arguments of the call that are none of its own options.

    Raises:
        TypeError: one of them is neither an option nor a processor's output that the target takes, or no tensor.
        ValueError: there is video among them that the target does not take, or an id that it does not have; pixels are
            empty or not finite; a mask holds something else than 0 and 1.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        found = input_ids.dtype if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids must be a tensor of ids, found {found}; processors take return_tensors='pt'")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must have the shape (B, L) with B, L > 0, found {tuple(input_ids.shape)}")
    if input_ids.is_meta:
        raise ValueError("input_ids is on the meta device, so there are no ids in it")
    taken = forward_parameters(model)
    for name, value in inputs.items():
        if name in (*taken, *BESIDE):
            continue
        if name not in VIDEO_INPUTS:
            raise TypeError(f"{arm.__name__}() got an unexpected keyword argument {name!r}{_hint(arm, name, taken)}")
        if value is not None:
            raise ValueError(f"{type(model).__name__} takes no video, found {name}")
    _check_ids(model, input_ids)
    inputs = {name: value for name, value in inputs.items() if name in taken and value is not None}
    for name, value in inputs.items():
        _check_input(name, value, tuple(input_ids.shape))
    _check_pixels(model, input_ids, inputs)
    return inputs


def forward_parameters(model: PreTrainedModel) -> tuple[str, ...]:
    """Processor outputs that the target's forward takes by name."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    named = (parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD)
    return tuple(name for name in named if name not in DECODING_SETS)


def refuse_missing(model: PreTrainedModel, inputs: Mapping) -> None:
    """Raises ValueError where a prompt lacks what the target's forward does not do without: InstructBLIP's images."""
    parameters = inspect.signature(type(model).forward).parameters
    needed = [name for name in forward_parameters(model) if parameters[name].default is inspect.Parameter.empty]
    missing = [name for name in needed if name != "input_ids" and inputs.get(name) is None]
    if missing:
        raise ValueError(f"{type(model).__name__} answers no prompt without {', '.join(missing)}")


def _hint(arm: Callable, name: str, taken: tuple[str, ...]) -> str:
    known = {*inspect.signature(arm).parameters, *taken, *INSTEAD} - {"inputs"}
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {INSTEAD.get(close[0], close[0])}?" if close else ""


def _check_input(name: str, value, shape: tuple[int, ...]) -> None:
    """Pixels that are not finite, or a mask that adds instead of hiding, would be answered without a word."""
    wants_tensor = name in PER_TOKEN or "pixel" in name or name.endswith("_grid_thw")
    if not isinstance(value, torch.Tensor):
        if isinstance(value, str) or wants_tensor or hasattr(value, "__array__"):
            found = type(value).__name__
            raise TypeError(f"{name} must be a tensor, found {found}; processors take return_tensors='pt'")
        return
    if name in PER_TOKEN and tuple(value.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape} of input_ids, found {tuple(value.shape)}")
    if value.is_complex() or value.dim() == 0 or value.is_meta:
        raise ValueError(f"{name} cannot be {value.dtype} of the shape {tuple(value.shape)} on {value.device}")
    if value.numel() == 0:
        raise ValueError(f"{name} is empty, its shape is {tuple(value.shape)}")
    if value.is_floating_point() and not value.isfinite().all():
        raise ValueError(f"{name} has numbers that are not finite")
    if name == "attention_mask" and ((value != 0) & (value != 1)).any():
        raise ValueError("attention_mask may hold 0 (padding) and 1 only")


def _check_pixels(model: PreTrainedModel, input_ids: torch.Tensor, inputs: Mapping) -> None:
    """Some families answer about nothing where sizes are there and pixels are not."""
    found = int((input_ids == image_token_id(model.config)).sum()) if image_token_id(model.config) is not None else 0
    shows = any(("pixel" in name or "image" in name) and torch.is_floating_point(value)
                for name, value in inputs.items() if isinstance(value, torch.Tensor))  # fmt: skip
    if found and not shows:
        raise ValueError(f"the prompt has {found} image tokens, but pixel_values is not among its inputs")


def _check_ids(model: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """An id beyond the embedding table would end deep inside: on a CPU in an index error, on a GPU with the process."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    wrong = (input_ids < 0) | (input_ids >= vocabulary)
    for mark in (image_token_id(model.config), video_token_id(model.config)):
        if mark is not None:  # some families mark images by an id behind their table
            wrong &= input_ids != mark
    if wrong.any():
        raise ValueError(
            f"input_ids has the id {int(input_ids[wrong][0])}, the target's vocabulary {vocabulary}: is the processor "
            "that of another target?"
        )
