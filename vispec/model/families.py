"""What differs between VLM families: where an image's tokens are, and how many each image got.

Everything else about a family is left to transformers. A family that is not listed works as long as its images do not
touch: every stretch of image tokens is then one image.
"""

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from vispec.model.pairs import Span


def image_token_id(config) -> int | None:
    """The id that fills the image rows of a prompt; None for a target without images."""
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    return None


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


def image_spans(model: PreTrainedModel, input_ids: torch.Tensor, inputs: Mapping) -> list[list[Span]]:
    """The token spans of the images of each row, also of images that touch.

    Args:
        model: the target; its config says which family it is.
        input_ids: (B, L) with image tokens already expanded, as the processors do.
        inputs: what else the processor returned (image sizes, grids).

    Raises:
        ValueError: the image tokens do not fit the images, or images touch in a family whose image lengths are unknown.
    """
    token = image_token_id(model.config)
    rows = [[] for _ in input_ids] if token is None else [_stretches(row == token) for row in input_ids.cpu()]
    family = model.config.model_type
    if family not in IMAGE_LENGTHS or model.config.vision_config.model_type == "pixtral":
        # a Pixtral tower behind LLaVA's class gives an image as many tokens as its size asks for
        _refuse_touching(family, rows, inputs)
        return rows
    if not any(rows):
        return rows
    total = sum(end - start for spans in rows for start, end in spans)
    try:
        lengths = IMAGE_LENGTHS[family](model.config, inputs)
    except KeyError as missing:
        name = missing.args[0]
        raise ValueError(f"the prompt has {total} image tokens, but {name} is not among its inputs") from None
    if total != sum(lengths):
        raise ValueError(
            f"the prompt has {total} image tokens, but its {len(lengths)} image(s) have {sum(lengths)}: "
            "ids and images do not belong together"
        )
    queue = iter(lengths)
    return [[part for span in spans for part in _split(span, queue)] for spans in rows]


def _split(span: Span, lengths) -> list[Span]:
    """Cut one stretch of image tokens into its images."""
    start, end = span
    parts = []
    while start < end:
        stop = start + next(lengths)
        if stop > end:
            raise ValueError(f"an image of {stop - start} tokens does not fit its run, {end - start} tokens long")
        parts.append((start, stop))
        start = stop
    return parts


def _stretches(is_image: torch.Tensor) -> list[Span]:
    """Maximal stretches of True in (L,)."""
    edges = torch.diff(is_image.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return list(zip(starts, ends, strict=True))


def _refuse_touching(family: str, rows: list[list[Span]], inputs: Mapping) -> None:
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, torch.Tensor) or pixels.dim() not in (4, 5):
        return  # patches of all images in one list, which does not tell how many they are
    found = sum(len(spans) for spans in rows)
    if 0 < found < pixels.shape[0]:
        raise ValueError(
            f"{family}: {pixels.shape[0]} images fill {found} stretch(es) of image tokens, so some of them touch; how "
            "many tokens an image of this family gets is not known here: put text between the images"
        )


def _llava_lengths(config, inputs: Mapping) -> list[int]:
    """LLaVA-1.5: one grid of patches, the class token too where the config keeps it."""
    return [_tile_tokens(config)] * len(inputs["pixel_values"])


def _llava_next_lengths(config, inputs: Mapping) -> list[int]:
    """LLaVA-NeXT: a base grid, then the tiles without their padding, with one newline token a row of patches."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    vision = config.vision_config
    per_side = vision.image_size // vision.patch_size
    lengths = []
    for size in inputs["image_sizes"]:
        size = torch.as_tensor(size).tolist()
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, vision.image_size)
        grid = torch.empty(1, rows * per_side, columns * per_side, device="meta")
        _, height, width = unpad_image(grid, size).shape
        lengths.append(_tile_tokens(config) + height * (width + 1))
    return lengths


def _tile_tokens(config) -> int:
    """Tokens of one square tile: its patches, and CLIP's class token unless the config drops the first one."""
    vision = config.vision_config
    class_token = 0 if vision.model_type.startswith("siglip") else 1
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    return (vision.image_size // vision.patch_size) ** 2 + class_token - dropped


def _qwen_lengths(config, inputs: Mapping) -> list[int]:
    """Qwen2-VL and Qwen2.5-VL: patches of the grid after merging."""
    merged = config.vision_config.spatial_merge_size**2
    return (inputs["image_grid_thw"].prod(dim=1) // merged).tolist()


def _padding(config) -> int:
    return config.get_text_config().pad_token_id


PLACEHOLDERS_AS: dict[str, Callable] = {"gemma4": _padding, "gemma4_unified": _padding, "kimi_k25": lambda config: 0}
"""The id that placeholders of images, videos and sounds are embedded as, by `model_type`: config -> id."""
IMAGE_LENGTHS: dict[str, Callable] = {
    "llava": _llava_lengths,
    "llava_next": _llava_next_lengths,
    "qwen2_vl": _qwen_lengths,
    "qwen2_5_vl": _qwen_lengths,
}
"""Tokens of each image, by `model_type`: (config, processor outputs) -> list of ints, in prompt order."""
