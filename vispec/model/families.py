"""What differs between VLM families: where the tokens of images and videos are, and how many each of them got.

Everything else about a family is left to transformers. How many tokens an image got follows from the numbers that the
processor returned (grids, sizes) and from the config; which of them a family counts by is asked of its config and its
forward, not of its name. Where the numbers are not known, every stretch of image tokens is one image.

A run is what a draft head may compress as one: an image, or a frame of a video. B rows, L tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

import torch
from torch import nn
from transformers import PreTrainedModel

from vispec.model.pairs import Span

PER_TOKEN = ("attention_mask", "mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids")
"""Inputs of the shape of input_ids."""
TILED = ("internvl", "qianfan_ocr", "got_ocr2")
"""Families that cut an image into entries of pixel_values and put tokens of their own around its stretch."""
ALIKE = ("pixel_mask", "pixel_attention_mask", "high_res_pixel_values")
"""Inputs beside pixel_values that do not change how many tokens an image gets."""


@dataclass
class Shown:
    """What the rows of a batch show."""

    runs: list[list[Span]]
    """Of each row, in order: its images and the frames of its videos."""
    images: list[int]
    """How many images each row has."""
    videos: list[int]
    image_tokens: list[int]
    """Of all images of each row."""


def image_token_id(config) -> int | None:
    """The id that fills the image rows of a prompt; None for a target without images."""
    return _token(config, "image_token_id", "image_token_index")


def video_token_id(config) -> int | None:
    """The id that fills the rows of a video; None where there is none, or where it is the image token."""
    token = _token(config, "video_token_id", "video_token_index")
    return None if token == image_token_id(config) else token


def token_kinds(config, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, L) 1 at image tokens, 2 at video tokens: how transformers 5 wants to be told where they are."""
    kinds = torch.zeros_like(input_ids)
    for kind, token in ((1, image_token_id(config)), (2, video_token_id(config))):
        if token is not None:
            kinds[input_ids == token] = kind
    return kinds


def embedded_ids(config, vocabulary: int) -> torch.Tensor | None:
    """(V,) the id whose embedding a family takes for each id of an answer; None: its own.

    Some families embed what stands for an image as padding, also where the model itself has said it.
    """
    if config.model_type not in PLACEHOLDERS_AS:
        return None
    ids, stand_in = torch.arange(vocabulary), PLACEHOLDERS_AS[config.model_type](config)
    for kind in ("image", "video", "audio"):
        ids[ids == getattr(config, f"{kind}_token_id", None)] = stand_in
    return ids


def _padding(config) -> int:
    return config.get_text_config().pad_token_id


PLACEHOLDERS_AS: dict[str, Callable] = {
    "gemma4": _padding,
    "gemma4_unified": _padding,
    "kimi_k25": lambda config: 0,
    "muse_glimmer": lambda config: 0,
    "muse_spark": lambda config: 0,
}
"""The id that placeholders of images, videos and sounds are embedded as, by `model_type`: config -> id."""


def tables_behind_text(model: PreTrainedModel) -> list[nn.Module]:
    """Modules that embed the ids from their `vocab_offset` on, in that order: Gemma 3n's of images and sounds."""
    tables = [module for module in model.modules() if hasattr(module, "vocab_offset")]
    return sorted(tables, key=lambda table: table.vocab_offset)


def image_spans(model: PreTrainedModel, input_ids: torch.Tensor, inputs: Mapping) -> list[list[Span]]:
    """The runs of each row, see `what_is_shown`."""
    return what_is_shown(model, input_ids, inputs).runs


def what_is_shown(model: PreTrainedModel, input_ids: torch.Tensor, inputs: Mapping) -> Shown:
    """The token spans of the images and video frames of each row, also of those that touch.

    Args:
        model: the target.
        input_ids: (B, L) with image tokens already expanded, as the processors do.
        inputs: what else the processor returned (image sizes, grids).

    Raises:
        ValueError: the tokens do not fit the images or videos, or images touch whose lengths are unknown.
    """
    ids, kinds = input_ids.cpu(), token_kinds(model.config, input_ids).cpu()
    told = inputs.get("mm_token_type_ids")
    if told is not None:  # GLM's videos are made of image tokens
        kinds[(ids == image_token_id(model.config)) & (told.cpu() == 2)] = 2
    if "video_grids" in inputs:  # Molmo2's too, which takes no images beside them
        kinds[kinds == 1] = 2
    images, broken = _of_images(model, kinds == 1, inputs), _has_breaks(model.config, inputs)
    videos = _of_videos(model.config, kinds == 2, inputs)
    dealt = [_deal(kinds == 1, images, "image", broken), _deal(kinds == 2, videos, "video", broken)]
    return Shown(
        runs=[sorted(run for items in row for item in items for run in item) for row in zip(*dealt, strict=True)],
        images=[len(items) for items in dealt[0]],
        videos=[len(items) for items in dealt[1]],
        image_tokens=(kinds == 1).sum(dim=1).tolist(),
    )


def merge_sizes(config, inputs: Mapping, medium: str) -> int | torch.Tensor | None:
    """Patches along a side that become one token: a number, or one for each image or video; None if it is not known."""
    vision, told = config.vision_config, inputs.get(f"{medium}_merge_sizes")
    if told is None:
        told = getattr(vision, "spatial_merge_size", getattr(vision, "merge_size", None))
    return getattr(vision, "merge_kernel_size", [None])[0] if told is None else told


def _token(config, *names: str) -> int | None:
    value = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    return None if value is None else int(value)


# --- from numbers to spans ---


def _deal(where: torch.Tensor, items: Sequence[Sequence[int]] | None, name: str, broken: bool):
    """The runs of every image or video of each row.

    Args:
        where: (B, L) bool, its tokens.
        items: tokens of the runs of each of them, in the batch's order; None makes one of every stretch.
        broken: tokens of another kind may stand within a run.
    """
    if items is None:
        return [[[stretch] for stretch in _stretches(row)] for row in where]
    total, wanted = int(where.sum()), sum(map(sum, items))
    if total != wanted:
        raise ValueError(
            f"the prompt has {total} {name} tokens, but its {len(items)} {name}(s) have {wanted}: "
            f"ids and {name}s do not belong together"
        )
    queue = iter(items)
    return [_deal_row(row.nonzero()[:, 0].tolist(), queue, name, broken) for row in where]


def _deal_row(places: list[int], queue: Iterator[Sequence[int]], name: str, broken: bool) -> list[list[Span]]:
    dealt, start = [], 0
    while start < len(places):
        runs = []
        for length in filter(None, next(queue)):
            own = places[start : start + length]
            start += length
            if len(own) < length or (own[-1] + 1 - own[0] > length and not broken):
                raise ValueError(f"a run of {length} {name} tokens does not fit where these tokens are")
            runs.append((own[0], own[-1] + 1))
        dealt.append(runs)
    return dealt


def _stretches(is_image: torch.Tensor) -> list[Span]:
    """Maximal stretches of True in (L,)."""
    edges = torch.diff(is_image.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return list(zip(starts, ends, strict=True))


def _grouped(where: torch.Tensor, counts: Sequence[int]) -> list[list[int]]:
    """The lengths of so many stretches, one after the other."""
    lengths = iter([end - start for row in where for start, end in _stretches(row)])
    return [list(islice(lengths, count)) for count in counts]


# --- images ---


def _of_images(model: PreTrainedModel, where: torch.Tensor, inputs: Mapping) -> list[list[int]] | None:
    """Tokens of the runs of each image; None where only the stretches tell."""
    if not where.any():
        return []
    config = model.config
    try:
        if _has_pixtral(config):
            lengths = _pixtral_lengths(config, inputs["image_sizes"])
        elif getattr(config, "image_grid_pinpoints", None):
            lengths = _tiled_lengths(model, inputs)
        elif "image_grid_thw" in inspect.signature(type(model).forward).parameters:
            lengths = _grid_lengths(config, inputs)
        elif "image_grids" in inputs:  # Molmo2: a small picture of the whole, then its crops
            lengths = [a * b + c * d for a, b, c, d in torch.as_tensor(inputs["image_grids"]).tolist()]
        elif (crops := _crops_apart(where, inputs)) is not None:
            return crops
        else:
            lengths = _equal_lengths(config.model_type, where, inputs)
    except KeyError as missing:
        name, found = missing.args[0], int(where.sum())
        raise ValueError(f"the prompt has {found} image tokens, but {name} is not among its inputs") from None
    return None if lengths is None else [[length] for length in lengths]


def _has_pixtral(config) -> bool:
    return getattr(getattr(config, "vision_config", None), "model_type", None) == "pixtral"


def _has_breaks(config, inputs: Mapping) -> bool:
    """Whether a row of patches may end with a token of its own."""
    return _has_pixtral(config) or "image_grids" in inputs or "video_grids" in inputs


def _pixtral_lengths(config, sizes) -> list[int]:
    """Pixtral and its kin: the patches that cover an image, after merging."""
    side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    return [(height // side) * (width // side) for height, width in torch.as_tensor(sizes).tolist()]


def _tiled_lengths(model: PreTrainedModel, inputs: Mapping) -> list[int]:
    """LLaVA-NeXT and its kin: a base grid, and tiles without their padding, packed by the model's own code."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, vision, sizes = model.config, model.config.vision_config, inputs["image_sizes"]
    owner = next(part for part in (getattr(model, "model", model), model) if hasattr(part, "pack_image_features"))
    takes = inspect.signature(owner.pack_image_features).parameters
    names = ("vision_feature_select_strategy", "vision_aspect_ratio")
    options = {name: getattr(config, name) for name in names if name in takes}
    rate = Fraction(getattr(config, "downsample_rate", None) or 1)
    side = int(vision.image_size // vision.patch_size * rate)
    sizes = torch.as_tensor(sizes)
    if sizes.dim() != 2 or sizes.shape[1] != 2:
        raise ValueError(f"image_sizes must have the shape (images, 2), found {tuple(sizes.shape)}")
    # of several images in one sample LLaVA-OneVision shows the base grids alone
    together = torch.as_tensor(inputs.get("batch_num_images", [1] * len(sizes))).tolist()
    alone = [number == 1 for number in together for _ in range(number)]
    lengths = []
    for size, tiled in zip(sizes.tolist(), alone, strict=True):
        tiles = image_size_to_num_patches(size, config.image_grid_pinpoints, vision.image_size) if tiled else 1
        given = inputs.get("pixel_values")
        if given is not None and given.dim() == 5 and tiles > given.shape[1]:
            raise ValueError(
                f"an image of size {size} has {tiles} tiles, pixel_values {given.shape[1]}: is the processor that of "
                "another target?"
            )
        features = torch.empty(tiles, side**2, 1)  # only their number matters
        packed = owner.pack_image_features([features], [size], image_newline=torch.empty(1), **options)
        packed = packed[0] if isinstance(packed, tuple) else packed
        lengths.append(sum(len(image) for image in packed) if isinstance(packed, list) else len(packed))
    return lengths


def _grid_lengths(config, inputs: Mapping) -> list[int] | None:
    """Qwen's and many others: patches of the grid after merging."""
    grids, merged = inputs["image_grid_thw"], merge_sizes(config, inputs, "image")
    if merged is None:
        return None
    if config.model_type == "hunyuan_vl":  # a token ends every row, and one stands at either end
        return [height // merged * (width // merged + 1) + 2 for _, height, width in grids.tolist()]
    return (grids.prod(dim=1) // merged**2).tolist()


def _crops_apart(where: torch.Tensor, inputs: Mapping) -> list[list[int]] | None:
    """Step 3.7's: crops and the whole picture, with tokens of their own around each; None where that is not so."""
    counts = [1 + crops for crops in torch.as_tensor(inputs.get("num_local_patches", [])).tolist()]
    stretches = sum(len(_stretches(row)) for row in where)
    return _grouped(where, counts) if counts and stretches == sum(counts) else None


def _equal_lengths(family: str, where: torch.Tensor, inputs: Mapping) -> list[int] | None:
    """Images in one tensor that no other input tells apart get the same number of tokens each."""
    if not any("pixel" in name or "image" in name for name in inputs):
        raise KeyError("pixel_values")
    stretches, tokens = [end - start for row in where for start, end in _stretches(row)], where.sum(dim=1).tolist()
    pixels = equal_images(inputs)
    if pixels is None:
        _refuse_touching(family, len(stretches), inputs)
        return None
    rows = has_rows(pixels, tokens)
    number = int(real_images(pixels).sum()) if rows else len(pixels)
    length, rest = divmod(sum(stretches), max(number, 1))
    if rest or length == 0 or any(stretch % length for stretch in stretches):
        raise ValueError(
            f"the prompt has {sum(stretches)} image tokens in {len(stretches)} stretch(es), which {number} images of "
            "one size cannot fill: ids and images do not belong together"
        )
    return stretches if rows or family in TILED else [length] * number


def equal_images(inputs: Mapping) -> torch.Tensor | None:
    """Pixels of images or tiles that no other input tells apart: (N, C, H, W), (N, tiles, C, H, W) or as `has_rows`."""
    name = next((name for name in ("pixel_values", "pixel_values_images") if name in inputs), None)
    known = {name, "input_ids", *PER_TOKEN, *ALIKE}
    pixels = inputs.get(name)
    if any(other not in known and "video" not in other for other in inputs):
        return None
    return pixels if isinstance(pixels, torch.Tensor) and pixels.dim() in (4, 5) else None


def has_rows(pixels: torch.Tensor, tokens: Sequence[int]) -> bool:
    """Whether pixels are (B, n, C, H, W), with all-zero images where a row has fewer than n: Idefics and its kin.

    Args:
        tokens: image tokens of each row; they tell it from (N, tiles, C, H, W).
    """
    if pixels.dim() != 5 or len(pixels) != len(tokens):
        return False
    real = real_images(pixels).sum(dim=1).tolist()
    return all(own * sum(tokens) == count * sum(real) for own, count in zip(real, tokens, strict=True))


def real_images(pixels: torch.Tensor) -> torch.Tensor:
    """(B, n) bool, which of the images (B, n, C, H, W) are there: the others are padding, all zero."""
    return (pixels != 0).flatten(2).any(dim=2)


def _refuse_touching(family: str, found: int, inputs: Mapping) -> None:
    """Where the lengths are not known, but the number of images is."""
    told = next((inputs[name] for name in ("image_sizes", "num_local_patches") if name in inputs), None)
    if told is not None and 0 < found < len(told):
        raise ValueError(
            f"{family}: {len(told)} images fill {found} stretch(es) of image tokens, so some of them touch; how "
            "many tokens an image of this family gets is not known here: put text between the images"
        )


# --- videos ---


def _of_videos(config, where: torch.Tensor, inputs: Mapping) -> list[list[int]] | None:
    """Tokens of the frames of each video; None where only the stretches tell."""
    grids, pixels = inputs.get("video_grid_thw"), inputs.get("pixel_values_videos")
    total = int(where.sum())
    if total and pixels is None:
        raise ValueError(f"the prompt has {total} video tokens, but pixel_values_videos is not among its inputs")
    if grids is not None:
        return _grid_frames(config, grids, inputs)
    if "video_grids" in inputs:  # Molmo2's count tokens
        return [[height * width] * frames for frames, height, width in torch.as_tensor(inputs["video_grids"]).tolist()]
    if "num_frames_per_video" in inputs:  # Gemma 4's stand apart
        return _grouped(where, torch.as_tensor(inputs["num_frames_per_video"]).tolist())
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 5:
        return None
    videos, frames = pixels.shape[:2]
    length, rest = divmod(total, videos)
    if rest or length < frames:
        raise ValueError(
            f"the prompt has {total} video tokens, which {videos} video(s) of {frames} frames cannot fill: ids and "
            "videos do not belong together"
        )
    frame, newline = divmod(length, frames)  # LLaVA-OneVision ends a video with one more token
    return [[frame] * (frames - 1) + [frame + newline]] * videos


def _grid_frames(config, grids: torch.Tensor, inputs: Mapping) -> list[list[int]] | None:
    merged = merge_sizes(config, inputs, "video")
    if merged is None:
        return None
    joined = getattr(config.vision_config, "temporal_merge_size", 1)
    areas = (grids[:, 1:].prod(dim=1) // merged**2).tolist()
    videos = [[area] * (frames // joined) for frames, area in zip(grids[:, 0].tolist(), areas, strict=True)]
    kept = inputs.get("video_compression_mask")
    if kept is None:
        return videos
    pieces = iter(kept.split([area for video in videos for area in video]))  # Video-LLaMA3 drops what stands still
    return [[int(next(pieces).sum()) for _ in video] for video in videos]
