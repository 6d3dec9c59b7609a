"""From a padded batch, as processors return it, to single prompts.

Each row gets what a processor would have returned for it alone: its tokens without the padding on their left, and its
own images and videos. That is all that decoding asks for, so no family has to be able to read a padded batch.
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from transformers import PreTrainedModel

from vispec.model.arguments import whole
from vispec.model.families import PER_TOKEN, Shown, equal_images, has_rows, merge_sizes, real_images, what_is_shown

logger = logging.getLogger("vispec")

CROPS = {"pixel_values": "image_num_crops", "pixel_values_local": "num_local_patches"}
CROPS |= dict.fromkeys(("pixel_values_videos", "video_position_ids"), "num_frames_per_video")
"""Inputs with an entry for each crop of an image or frame of a video, and those that say how many each of them has."""
POOLED = {"image_token_pooling": "pixel_values", "video_token_pooling": "pixel_values_videos"}
"""Molmo2's tokens by the numbers of their patches, and those patches."""

SinglePrompt = tuple[torch.Tensor, dict]
"""input_ids (1, L) without padding, and the other inputs."""


def single_prompts(model: PreTrainedModel, input_ids: torch.Tensor, inputs: Mapping) -> list[SinglePrompt]:
    """The prompts of a batch.

    Args:
        model: the target.
        input_ids: (B, L), padded on the left.
        inputs: what else the processor returned, as `prompt_inputs` leaves it; tensors are (B, L), or have one entry
            for each image or video of the batch, or for each tile or patch, or are (B, images of a row, …).

    Raises:
        ValueError: the shapes do not fit each other, something else than the left is padded, the images do not fit the
            image tokens, or an input is there whose rows cannot be told apart.
    """
    attention = inputs.get("attention_mask")
    images = [inputs] if len(input_ids) == 1 else _inputs_of_rows(model, input_ids, inputs)
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
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    if max_length is not None:
        max_length = whole("max_length", max_length, 1)
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


def _inputs_of_rows(model: PreTrainedModel, input_ids: torch.Tensor, inputs: Mapping) -> list[dict]:
    """The inputs that belong to images and videos, of each row; a prompt without them has no such inputs."""
    shown = what_is_shown(model, input_ids, inputs)
    alike = equal_images(inputs)
    filled_up = alike is not None and has_rows(alike, shown.image_tokens)
    rows: list[dict] = [{} for _ in input_ids]
    for name, value in inputs.items():
        if name in PER_TOKEN:
            continue
        if filled_up and name in ("pixel_values", "pixel_attention_mask"):
            pieces = [value[row : row + 1, own] if own.any() else [] for row, own in enumerate(real_images(alike))]
        else:
            pieces = _pieces(name, value, _sizes(model.config, name, inputs, shown), shown)
        for own, piece in zip(rows, pieces, strict=True):
            if len(piece):
                own[name] = piece
    for name, pixels in POOLED.items():
        if name in inputs:
            _rebase_pooling(rows, name, pixels)
    return rows


def _pieces(name: str, value, sizes: list[int], shown: Shown) -> list:
    """The entries of each row, one row after the other."""
    if not hasattr(value, "__len__") or len(value) != sum(sizes):
        found = len(value) if hasattr(value, "__len__") else type(value).__name__
        medium, number = ("video", sum(shown.videos)) if _is_of_videos(name) else ("image", sum(shown.images))
        raise ValueError(f"{name}: expected one entry for each of the {number} {medium}s, found {found}")
    ends = list(accumulate(sizes))
    return [value[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _sizes(config, name: str, inputs: Mapping, shown: Shown) -> list[int]:
    """How many entries of an input belong to each row."""
    medium, counts = ("video", shown.videos) if _is_of_videos(name) else ("image", shown.images)
    grids = inputs.get(f"{medium}_grid_thw")
    if grids is not None and name in ("pixel_values", "pixel_values_videos"):  # one row for each patch
        return _sums(grids.prod(dim=1), counts)
    if name == "video_compression_mask":  # one entry for each token before some were dropped
        return _sums(grids.prod(dim=1) // merge_sizes(config, inputs, medium) ** 2, counts)
    if medium == "video" and "video_grids" in inputs and name != "video_grids":
        frames = torch.as_tensor(inputs["video_grids"])
        return _sums(frames.prod(dim=1) if name in POOLED else frames[:, 0], counts)
    if name == "batch_num_images":
        return _groups(inputs[name], counts)
    if CROPS.get(name) in inputs:
        return _sums(torch.as_tensor(inputs[CROPS[name]]), counts)
    tokens, entries = sum(shown.image_tokens), len(inputs[name]) if hasattr(inputs[name], "__len__") else 0
    if medium == "video" or entries == sum(counts) or tokens == 0:
        return counts
    if entries == tokens:  # Fuyu's patches, Molmo2's places
        return shown.image_tokens
    if name.startswith("pixel_") and equal_images(inputs) is not None:  # tiles, of which all have as many tokens
        shares = [divmod(own * entries, tokens) for own in shown.image_tokens]
        return counts if any(rest for _, rest in shares) else [share for share, _ in shares]
    return counts


def _is_of_videos(name: str) -> bool:
    return "video" in name or name == "second_per_grid_ts"


def _sums(values: torch.Tensor, counts: list[int]) -> list[int]:
    """The sum over the images of each row; an empty list where there is not one value for each of them."""
    return [int(own.sum()) for own in values.split(counts)] if len(values) == sum(counts) else []


def _groups(sizes: torch.Tensor | Sequence[int], counts: list[int]) -> list[int]:
    """How many groups of images belong to each row, where the groups have these sizes."""
    groups = torch.as_tensor(sizes).tolist()
    ends = list(accumulate(groups, initial=0))
    bounds = list(accumulate(counts, initial=0))
    if not set(bounds) <= set(ends):
        raise ValueError(f"batch_num_images: groups of {groups} images do not fit rows of {counts} images")
    places = [ends.index(bound) for bound in bounds]
    return [stop - start for start, stop in pairwise(places)]


def _rebase_pooling(rows: list[dict], name: str, pixels: str) -> None:
    """Their numbers count the patches of all the batch; -1 is none."""
    before = 0
    for own in rows:
        if name in own:
            own[name] = torch.where(own[name] >= 0, own[name] - before, own[name])
            before += own[pixels].shape[0] * own[pixels].shape[1]
