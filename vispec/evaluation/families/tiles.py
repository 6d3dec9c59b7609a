"""Families that cut an image into tiles or crops, or whose images have sizes of their own."""

from inspect import signature

import torch
import torch.nn.functional as F
from transformers import LlavaOnevisionForConditionalGeneration

from vispec.evaluation.families.family import (
    BREAK,
    END,
    IMAGE,
    SQUARE,
    START,
    TEXT,
    VISION,
    VOCABULARY,
    Family,
    Inputs,
    Layout,
    Shown,
)
from vispec.evaluation.families.squares import (
    BOTH_MARKS,
    CLIP,
    GRANITE,
    LLAMA,
    MARKS,
    MISTRAL,
    QWEN2,
    SIGLIP,
    STOOD_IN,
    TIMM,
    clips,
)

PINPOINTS = [[28, 56], [56, 28], [56, 56]]
"""LLaVA-NeXT's choice of tiles, height and width."""
PIXELS = ((40, 60), (60, 40))
"""Sizes of images; of them follow the tokens that LLaVA-NeXT's processor counts."""
SIZES = ((28, 42), (14, 28))


# --- tiles of one size, with no other input ---


def tiles(tokens: int, side: int = 28) -> Layout:
    """An image of size n has n + 1 tiles of so many tokens."""

    def layout(sizes: list[int]) -> Shown:
        ids = [[START, *[IMAGE] * tokens * (size + 1), END] for size in sizes]

        def inputs(noise: torch.Generator) -> Inputs:
            return {"pixel_values": torch.randn(sum(sizes) + len(sizes), 3, side, side, generator=noise)}

        return Shown(ids, inputs)

    return layout


def two_tiles(sizes: list[int]) -> Shown:
    """PerceptionLM: a small picture and a tile of 4 tokens each, (N, 2, C, H, W)."""
    pixels = (len(sizes), 2, 3, 28, 28)
    return Shown([[IMAGE] * 8 for _ in sizes], lambda noise: {"pixel_values": torch.randn(*pixels, generator=noise)})


# --- a base tile and tiles without their padding ---


def packed(lengths: tuple[int, int]) -> Layout:
    """Images of PIXELS with so many tokens; every one is given with the most tiles there can be."""

    def layout(sizes: list[int]) -> Shown:
        def inputs(noise: torch.Generator) -> Inputs:
            pixels = torch.randn(len(sizes), 5, 3, 28, 28, generator=noise)
            return {"pixel_values": pixels, "image_sizes": torch.tensor([PIXELS[size] for size in sizes])}

        return Shown([[IMAGE] * lengths[size] for size in sizes], inputs)

    return layout


def alone_or_not(sizes: list[int]) -> Shown:
    """LLaVA-OneVision under transformers 5: an image alone has tiles; several have only a token that ends each."""
    if "batch_num_images" not in signature(LlavaOnevisionForConditionalGeneration.forward).parameters:
        return packed((70, 72))(sizes)
    lengths = (70, 72) if len(sizes) == 1 else (17, 17)

    def inputs(noise: torch.Generator) -> Inputs:
        pixels = torch.randn(len(sizes), 5, 3, 28, 28, generator=noise)
        sides = torch.tensor([PIXELS[size] for size in sizes])
        return {"pixel_values": pixels, "image_sizes": sides, "batch_num_images": torch.tensor([len(sizes)])}

    return Shown([[IMAGE] * lengths[size] for size in sizes], inputs)


# --- rows of images, filled up with zeros ---


def rows(sizes: list[int]) -> Shown:
    """Idefics and its kin: (1, n, C, H, W), and a mask of what each picture fills of its square."""

    def inputs(noise: torch.Generator) -> Inputs:
        pixels = torch.randn(1, len(sizes), 3, 28, 28, generator=noise)
        seen = torch.ones(1, len(sizes), 28, 28, dtype=torch.bool)
        for place, size in enumerate(sizes):
            seen[0, place, 28 - 7 * size :] = False
        return {"pixel_values": pixels, "pixel_attention_mask": seen}

    return Shown([[START, *[IMAGE] * 4, END] for _ in sizes], inputs)


def fill_rows(parts: list[Inputs]) -> Inputs:
    most = max(part["pixel_values"].shape[1] for part in parts if part)
    joined = {}
    for name in ("pixel_values", "pixel_attention_mask"):
        empty = torch.zeros_like(next(part[name] for part in parts if part)[:, :0])
        given = [part.get(name, empty) for part in parts]
        ahead = (0, 0) * (empty.dim() - 2)
        joined[name] = torch.cat([F.pad(row, (*ahead, 0, most - row.shape[1])) for row in given])
    return joined


# --- rows of patches that end with a token of their own ---


def broken(side: int, end: bool = True) -> Layout:
    """Pixtral and its kin: patches of `side` pixels, after merging."""

    def layout(sizes: list[int]) -> Shown:
        ids = []
        for height, width in (SIZES[size] for size in sizes):
            lines = ([IMAGE] * (width // side) + [BREAK]) * (height // side)
            ids.append([*lines[:-1], END] if end else [t for t in lines if t == IMAGE])

        def inputs(noise: torch.Generator) -> Inputs:
            pixels = torch.zeros(len(sizes), 3, 28, 42)
            for place, (height, width) in enumerate(SIZES[size] for size in sizes):
                pixels[place, :, :height, :width] = torch.randn(3, height, width, generator=noise)
            return {"pixel_values": pixels, "image_sizes": torch.tensor([SIZES[size] for size in sizes])}

        return Shown(ids, inputs)

    return layout


def patch_rows(sizes: list[int]) -> Shown:
    """Fuyu: two rows of n + 1 patches."""
    ids = [([IMAGE] * (size + 1) + [BREAK]) * 2 for size in sizes]
    number = 2 * sum(size + 1 for size in sizes)
    return Shown(ids, lambda noise: {"pixel_values": torch.randn(number, 7 * 7 * 3, generator=noise)})


# --- crops whose patches are pooled by their numbers ---


def crops(sizes: list[int]) -> Shown:
    """Molmo2: a small picture and n + 1 crops of 2 x 2 patches; two patches make a token."""
    ids = [[START, IMAGE, IMAGE, END, START, *[IMAGE, IMAGE, BREAK] * (size + 1), END] for size in sizes]
    counts = [size + 2 for size in sizes]

    def inputs(noise: torch.Generator) -> Inputs:
        pooling = torch.arange(sum(counts) * 4).reshape(-1, 2)
        pooling[0, 1] = -1  # a token at the edge has fewer patches
        pixels = torch.randn(sum(counts), 4, 7 * 7 * 3, generator=noise)
        numbers = {"image_grids": torch.tensor([[2, 1, size + 1, 2] for size in sizes])}
        numbers["image_num_crops"] = torch.tensor(counts)
        return {"pixel_values": pixels, "image_token_pooling": pooling, **numbers}

    return Shown(ids, inputs)


def frames(sizes: list[int]) -> Shown:
    """Molmo2: n + 2 frames of 2 x 2 patches; two patches make a token, and the tokens are those of images."""
    ids = [[token for number in range(size + 2) for token in (3 + number, START, IMAGE, IMAGE, END)] for size in sizes]
    total = sum(sizes) + 2 * len(sizes)

    def inputs(noise: torch.Generator) -> Inputs:
        pixels = torch.randn(total, 4, 7 * 7 * 3, generator=noise)
        pooling, grids = torch.arange(total * 4).reshape(-1, 2), torch.tensor([[size + 2, 2, 1] for size in sizes])
        return {"pixel_values_videos": pixels, "video_token_pooling": pooling, "video_grids": grids}

    return Shown(ids, inputs)


def rebase(parts: list[Inputs]) -> Inputs:
    """Molmo2 numbers the patches of a whole batch."""
    parts = [dict(part) for part in parts if part]
    for name, pixels in (("image_token_pooling", "pixel_values"), ("video_token_pooling", "pixel_values_videos")):
        before = 0
        for part in parts:
            if name in part:
                part[name] = torch.where(part[name] < 0, part[name], part[name] + before * 4)
                before += len(part[pixels])
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


_AS_IMAGES = "its processor gives the frames of a video as images"
_PERCEIVER = {"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
_PERCEIVER |= {"resampler_head_dim": 16, "num_key_value_heads": 1}
_PIXTRAL = {**VISION, "image_size": 56, "patch_size": 7, "model_type": "pixtral"}
_IDEFICS3 = {"text_config": LLAMA, "vision_config": SQUARE, "scale_factor": 2, **MARKS}
_HEADS = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
_INTERN_TOWER = {**SQUARE, "image_size": [28, 28], "patch_size": [7, 7], "model_type": "internvl_vision"}


def _llava_next(text: dict, **more) -> dict:
    return {"text_config": text, "vision_config": CLIP, "image_grid_pinpoints": PINPOINTS, **MARKS, **more}


FAMILIES = {
    "llava_next (Vicuna)": Family("llava_next", _llava_next(LLAMA), packed((70, 72))),
    "llava_next (Mistral)": Family("llava_next", _llava_next({**MISTRAL, "sliding_window": None}), packed((70, 72))),
    "llava_next (Granite)": Family(
        "llava_next",
        _llava_next({**TEXT, **GRANITE}, vision_feature_layer=[-1, -2]),
        packed((70, 72)),
        remark="Granite Vision's layers of features, scaled logits",
    ),
    "llava_next_video": Family("llava_next_video", _llava_next(LLAMA, **BOTH_MARKS), packed((70, 72)), clips(3, 4)),
    "llava_onevision": Family(
        "llava_onevision",
        {"text_config": QWEN2, "vision_config": SIGLIP, "image_grid_pinpoints": PINPOINTS, **BOTH_MARKS},
        alone_or_not,
        clips(3, 4, newline=1),
    ),
    "perception_lm": Family(
        "perception_lm",
        {
            "text_config": LLAMA,
            "vision_config": {**TIMM, "model_args": {"embed_dim": 32}},
            "vision_use_cls_token": False,
            **BOTH_MARKS,
        },
        two_tiles,
        clips(3, 4),
        remark=STOOD_IN,
    ),
    "internvl": Family(
        "internvl",
        {"text_config": QWEN2, "vision_config": _INTERN_TOWER, "image_seq_length": 4, **MARKS},
        tiles(4),
        remark=f"an image of one tile, one of two; {_AS_IMAGES}",
    ),
    "idefics2": Family(
        "idefics2",
        {
            "text_config": {**MISTRAL, "sliding_window": 16},
            "vision_config": SQUARE,
            "perceiver_config": _PERCEIVER,
            **MARKS,
        },
        rows,
        join=fill_rows,
        remark="a window of 16 tokens",
    ),
    "idefics3": Family("idefics3", _IDEFICS3, rows, join=fill_rows),
    "smolvlm": Family("smolvlm", _IDEFICS3, rows, join=fill_rows, remark=_AS_IMAGES),
    "llava (Pixtral)": Family(
        "llava",
        {
            "text_config": MISTRAL | {"sliding_window": None},
            "vision_config": _PIXTRAL,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            **MARKS,
        },
        broken(7),
    ),
    "mistral3": Family(
        "mistral3",
        {
            "text_config": {**MISTRAL, "head_dim": 16, "sliding_window": None},
            "vision_config": _PIXTRAL,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
            **MARKS,
        },
        broken(14),
    ),
    "fuyu": Family("fuyu", {**TEXT, "patch_size": 7, "num_key_value_heads": 4, **MARKS}, patch_rows),
    "molmo2": Family(
        "molmo2",
        {
            "text_config": {**TEXT, "vocab_size": BREAK, "additional_vocab_size": VOCABULARY - BREAK, "head_dim": 16},
            "vision_config": {
                **_HEADS,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "patch_size": 7,
                "image_size": [14, 14],
                "num_position_embeddings": 4,
            },
            "adapter_config": {
                **_HEADS,
                "intermediate_size": 48,
                "text_hidden_size": 64,
                "vision_feature_layer": [-1, -2],
            },
            "image_start_token_id": START,
            "low_res_image_start_token_id": START,
            "image_end_token_id": END,
            "image_patch_id": IMAGE,
        },
        crops,
        frames,
        join=rebase,
    ),
}
