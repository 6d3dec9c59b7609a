"""From a padded batch, as processors return it, to single prompts.

Each row gets what a processor would have returned for it alone: its tokens without the padding on their left, and its
own images. That is all that decoding asks for, so no family has to be able to read a padded batch.
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from vispec.model.families import image_spans
from vispec.model.inputs import PER_TOKEN

logger = logging.getLogger("vispec")

SinglePrompt = tuple[torch.Tensor, dict]
"""input_ids (1, L) without padding, and the other inputs."""


def single_prompts(model: PreTrainedModel, input_ids: torch.Tensor, inputs: Mapping) -> list[SinglePrompt]:
    """The prompts of a batch.

    Args:
        model: the target.
        input_ids: (B, L), padded on the left.
        inputs: what else the processor returned, as `prompt_inputs` leaves it; tensors are (B, L), or have one row for
            each image of the batch, or (pixel_values of Qwen) for each patch.

    Raises:
        ValueError: the shapes do not fit each other, something else than the left is padded, the images do not fit the
            image tokens, or an input is there whose rows cannot be told apart.
    """
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must have the shape (B, L) with B, L > 0, found {tuple(input_ids.shape)}")
    shape, attention = tuple(input_ids.shape), inputs.get("attention_mask")
    if attention is not None and tuple(attention.shape) != shape:
        raise ValueError(f"attention_mask must have the shape {shape} of input_ids, found {tuple(attention.shape)}")
    images = [inputs] if len(input_ids) == 1 else _images_of_rows(model, input_ids, inputs)
    prompts = []
    for row, own in enumerate(images):
        padding = 0 if attention is None else _padding(row, attention)
        tokens = {name: inputs[name][row : row + 1, padding:] for name in PER_TOKEN if name in inputs}
        prompts.append((input_ids[row : row + 1, padding:], {**own, **tokens}))
    return prompts


def row_name(row: int, batch: int) -> str:
    """What a message about one prompt begins with."""
    return "" if batch == 1 else f"row {row}: "


def new_token_limits(
    lengths: Sequence[int], padded: int, positions: int, max_new_tokens: int, max_length: int | None
) -> list[int]:
    """Most new tokens of each prompt of a batch.

    Args:
        lengths: tokens of each prompt without padding.
        padded: with it.
        positions: of the target.

    Raises:
        ValueError: there is no room for one.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    if max_length is not None and max_length <= padded:
        raise ValueError(f"the prompt has {padded} tokens, max_length {max_length} leaves no room for more")
    limits = []
    for row, length in enumerate(lengths):
        name = row_name(row, len(lengths))
        if length > positions:
            raise ValueError(f"{name}the prompt has {length} tokens, the target has {positions} positions")
        # the last new token is never fed back, so it needs no position
        limit = min(max_new_tokens, positions - length + 1)
        if limit < max_new_tokens and max_length is None:
            logger.warning(
                "%sthe prompt has %d tokens, the target %d positions: the answer ends after %d tokens at the latest",
                *(name, length, positions, limit),
            )
        limits.append(limit if max_length is None else min(limit, max_length - padded))
    return limits


def _padding(row: int, attention: torch.Tensor) -> int:
    """How many tokens on the left of a row are padding."""
    hidden = attention[row] == 0
    padding = int(hidden.sum())
    if padding == hidden.shape[0] or not bool(hidden[:padding].all()):
        raise ValueError(
            f"{row_name(row, len(attention))}attention_mask may only hide padding on the left of the prompt"
        )
    return padding


def _images_of_rows(model: PreTrainedModel, input_ids: torch.Tensor, inputs: Mapping) -> list[dict]:
    """The inputs that belong to images, of each row."""
    counts = [len(spans) for spans in image_spans(model, input_ids, inputs)]
    rows: list[dict] = [{} for _ in counts]
    for name, value in inputs.items():
        if name in PER_TOKEN:
            continue
        sizes = counts
        if name == "pixel_values" and "image_grid_thw" in inputs:  # one row for each patch, not for each image
            patches = inputs["image_grid_thw"].prod(dim=1).split(counts)
            sizes = [int(own.sum()) for own in patches]
        if not hasattr(value, "__len__") or len(value) != sum(sizes):
            found = len(value) if hasattr(value, "__len__") else type(value).__name__
            raise ValueError(f"{name}: expected one entry for each of the {sum(counts)} images, found {found}")
        start = 0
        for own, size in zip(rows, sizes, strict=True):
            if size:  # a prompt without images has no such inputs
                own[name] = value[start : start + size]
            start += size
    return rows
