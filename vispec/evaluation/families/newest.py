"""Families of later kinds, and those that are refused by what they are."""

from functools import partial

import torch

from vispec.evaluation.families.family import (
    BREAK,
    END,
    IMAGE,
    SQUARE,
    START,
    TEXT,
    VIDEO,
    VISION,
    Family,
    Inputs,
    Shown,
)
from vispec.evaluation.families.further import SAM
from vispec.evaluation.families.grids import EXPERTS, FLAT, MARKS, QWEN3_TOWER, grid_clips, grids, mrope
from vispec.evaluation.families.squares import BOTH_MARKS, CLIP, EVERY_OTHER, GRANITE, LAYERS, WINDOWED
from vispec.evaluation.families.squares import MARKS as IMAGE_MARKS
from vispec.evaluation.families.tiles import PINPOINTS, fill_rows, packed
from vispec.evaluation.families.windows import LATENT, LATENT_EXPERTS, placed, placed_frames

_WIDE = {**TEXT, **EVERY_OTHER, "head_dim": 16}
_SPARSE = {"n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
_LINEAR |= {"linear_value_head_dim": 8}
_DELTA_NETS = {**_LINEAR, "num_hidden_layers": 3, "layer_types": ["linear_attention"] * 2 + ["full_attention"]}
_DELTA_NETS |= {"head_dim": 16, **mrope(2, 3, 3, partial_rotary_factor=1.0)}
_TWO_OF_THREE = "two layers of three are gated delta nets: chains"
_CONVOLUTIONS = "two layers of three are convolutions: chains"
_LFM2_TOWER = {**VISION, "patch_size": 7, "num_patches": 16, "model_type": "siglip2_vision_model"}
_LFM2 = {"vision_config": _LFM2_TOWER, "projector_hidden_size": 32, "image_token_id": IMAGE}
_MUSE_TOWER = {**VISION, "patch_size": 7, "pos_emb_height": 4, "pos_emb_width": 4}
_QFORMER = {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 48}
_QFORMER |= {"cross_attention_frequency": 1, "max_position_embeddings": 64, "use_qformer_text_input": False}
_VQ = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}
_VISUAL = 20
"""Ids of ordinary text that also stand for a quantised patch."""
_SHAPES = ((4, 4), (2, 4))
_DOTS = ((4, 6), (2, 4))
_PATCH = (FLAT,)


def shaped(sizes: list[int]) -> Shown:
    """LFM2's: patches in rows that are filled up, with the shape of each image; 2 x 2 to a token."""
    shapes = [_SHAPES[size] for size in sizes]

    def inputs(noise: torch.Generator) -> Inputs:
        pixels, seen = torch.zeros(len(sizes), 16, 3 * 7 * 7), torch.zeros(len(sizes), 16, dtype=torch.int32)
        for place, (height, width) in enumerate(shapes):
            pixels[place, : height * width] = torch.randn(height * width, 3 * 7 * 7, generator=noise)
            seen[place, : height * width] = 1
        return {"pixel_values": pixels, "pixel_attention_mask": seen, "spatial_shapes": torch.tensor(shapes)}

    return Shown([[START, *[IMAGE] * (height * width // 4), END] for height, width in shapes], inputs)


def tile_rows(sizes: list[int]) -> Shown:
    """Granite Docling's: tiles in rows as Idefics has them, and which of a row's tiles are real."""

    def inputs(noise: torch.Generator) -> Inputs:
        pixels = torch.randn(1, len(sizes), 3, 28, 28, generator=noise)
        return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(1, len(sizes), dtype=torch.bool)}

    return Shown([[START, *[IMAGE] * 4, END] for _ in sizes], inputs)


def quantised(sizes: list[int]) -> Shown:
    """Emu 3: a token for every pixel of tiny pictures, and one behind each of their rows."""
    sides = [_DOTS[size] for size in sizes]

    def inputs(noise: torch.Generator) -> Inputs:
        return {"pixel_values": torch.randn(len(sizes), 3, 4, 6, generator=noise), "image_sizes": torch.tensor(sides)}

    return Shown([[START, *[IMAGE] * (height * (width + 1)), END] for height, width in sides], inputs)


def _with_crops(side: int, sizes: list[int], noise: torch.Generator) -> Inputs:
    """The whole of every picture, and n crops of it."""
    inputs = {"pixel_values": torch.randn(len(sizes), 3, side, side, generator=noise)}
    if sum(sizes):
        inputs["pixel_values_local"] = torch.randn(sum(sizes), 3, side, side, generator=noise)
    return {**inputs, "num_local_patches": torch.tensor(sizes)}


def in_one(sizes: list[int]) -> Shown:
    """DeepSeek-OCR 2: 144 tokens each, and one behind them."""
    return Shown([[IMAGE] * (144 * (size + 1) + 1) for size in sizes], partial(_with_crops, 64, sizes))


def apart(sizes: list[int]) -> Shown:
    """Step 3.7: 4 tokens each, with tokens of their own around."""
    return Shown([[START, *[IMAGE] * 4, END] * (size + 1) for size in sizes], partial(_with_crops, 56, sizes))


def _lfm2(*kinds: str) -> dict:
    layers = {"num_hidden_layers": len(kinds), "layer_types": list(kinds)}
    return {"text_config": {**TEXT, "model_type": "lfm2", **layers}, **_LFM2}


def _minimax(*kinds: str) -> dict:
    text = {**TEXT, "head_dim": 16, "rotary_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    text |= {"dense_intermediate_size": 48, "shared_intermediate_size": 48, "layer_types": list(kinds)}
    tower = {**VISION, "patch_size": 7, "image_size": 28}
    return {"text_config": text, "vision_config": tower, "projector_hidden_size": 32, **BOTH_MARKS}


FAMILIES = {
    "cosmos3_edge": Family(
        "cosmos3_edge",
        {
            "text_config": {**TEXT, "head_dim": 16, **mrope(2, 3, 3)},
            "vision_config": {**VISION, "patch_size": 7, "num_patches": 16, "spatial_merge_size": 2},
            "projector_hidden_size": 32,
            **MARKS,
        },
        grids((3 * 7 * 7,)),
        grid_clips((3 * 7 * 7,), stamped=True),
    ),
    "qwen3_5 (full attention)": Family(
        "qwen3_5",
        {
            "text_config": {**TEXT, "layer_types": ["full_attention"] * 2, "head_dim": 16}
            | mrope(1, 1, 0, mrope_interleaved=True),
            "vision_config": QWEN3_TOWER,
            **MARKS,
        },
        grids(_PATCH),
        grid_clips(_PATCH, stamped=True),
    ),
    "granite_docling": Family(
        "granite_docling",
        {
            "text_config": {**TEXT, **GRANITE, "model_type": "granite_docling_text"},
            "vision_config": {**SQUARE, "scale_factor": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
            "image_token_id": IMAGE,
        },
        tile_rows,
        join=fill_rows,
        remark="scaled logits",
    ),
    "granite4_vision": Family(
        "granite4_vision",
        {
            "text_config": {**TEXT, **LAYERS, "model_type": "granite4_vision_text", "logits_scaling": 4.0},
            "vision_config": {**CLIP, "hidden_size": 64},
            "qformer_config": _QFORMER,
            "downsample_rate": "2/4",
            "deepstack_layer_map": [[-2, 0], [-1, 1]],
            "spatial_target_layers": [2, 3, 3, 3],
            "image_grid_pinpoints": PINPOINTS,
            **IMAGE_MARKS,
        },
        packed((14, 16)),
        remark="features added at later layers, scaled logits",
    ),
    "deepseek_ocr2": Family(
        "deepseek_ocr2",
        {
            "text_config": {**TEXT, **LATENT_EXPERTS, "moe_intermediate_size": 32}
            | {"mlp_layer_types": ["dense", "sparse"]},
            "vision_config": {
                "sam_config": {**SAM, "downsample_channels": [32, 64]},
                "encoder_config": {**VISION, "hidden_size": 64, "num_key_value_heads": 4},
            },
            "image_token_id": IMAGE,
        },
        in_one,
    ),
    "lfm2_vl": Family("lfm2_vl", _lfm2("conv", "full_attention", "conv"), shaped, remark=_CONVOLUTIONS),
    "lfm2_vl (full attention)": Family("lfm2_vl", _lfm2("full_attention", "full_attention"), shaped),
    "qwen3_5": Family(
        "qwen3_5",
        {"text_config": {**TEXT, **_DELTA_NETS}, "vision_config": QWEN3_TOWER, **MARKS},
        grids(_PATCH),
        grid_clips(_PATCH, stamped=True),
        remark=_TWO_OF_THREE,
    ),
    "qwen3_5_moe": Family(
        "qwen3_5_moe",
        {
            "text_config": {**TEXT, **_DELTA_NETS, **EXPERTS, "shared_expert_intermediate_size": 32},
            "vision_config": QWEN3_TOWER,
            **MARKS,
        },
        grids(_PATCH),
        grid_clips(_PATCH, stamped=True),
        remark=_TWO_OF_THREE,
    ),
    **{
        kind: Family(
            kind,
            {
                "text_config": {**TEXT, **_DELTA_NETS, "model_type": "qwen3_5_text"},
                "vision_config": {**SQUARE, "insert_layer_id": 0},
                "image_token_id": IMAGE,
                "video_token_id": VIDEO,
            },
            remark=f"{_TWO_OF_THREE}; text alone",
        )
        for kind in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")
    },
    "lfm3_vl": Family(
        "lfm3_vl",
        {
            "text_config": {**TEXT, "model_type": "lfm3", "num_hidden_layers": 3}
            | {"layer_types": ["conv", "full_attention", "conv"]},
            "vision_config": {**VISION, "patch_size": 7},
            "image_token_id": IMAGE,
        },
        remark=f"{_CONVOLUTIONS}; text alone",
    ),
    "gemma4_unified": Family(
        "gemma4_unified",
        {
            "text_config": {**_WIDE, "final_logit_softcapping": 5.0},
            "vision_config": {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 64, "mm_posemb_size": 16}
            | {"output_proj_dims": 64},
            "audio_config": None,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": 1,
        },
        placed(2, 3 * 8 * 8),
        placed_frames(2, 3 * 8 * 8),
        remark=f"{WINDOWED}, capped logits",
    ),
    "step3p7": Family(
        "step3p7",
        {
            "text_config": {**_WIDE, **_SPARSE, "share_expert_dim": 32} | {"mlp_layer_types": ["dense", "sparse"] * 2},
            "vision_config": {**SQUARE, "image_size": 56},
            "image_token_id": IMAGE,
        },
        apart,
        remark=WINDOWED,
    ),
    "muse_glimmer": Family(
        "muse_glimmer",
        {
            "text_config": _WIDE,
            "vision_config": _MUSE_TOWER,
            "out_hidden_size": 128,
            "projector_hidden_size": 32,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
        grids(_PATCH),
        grid_clips(_PATCH, stamped=True),
        remark=f"{WINDOWED}, capped logits",
    ),
    "muse_spark": Family(
        "muse_spark",
        {
            "text_config": {**_WIDE, **_SPARSE, "moe_hidden_size": 32},
            "vision_config": _MUSE_TOWER,
            "audio_config": {"hidden_sizes": [8] * 4, "depths": [1] * 4, "out_hidden_size": 64, "conv_kernel_size": 3},
            "out_hidden_size": 128,
            "projector_hidden_size": 32,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": 1,
        },
        grids(_PATCH),
        grid_clips(_PATCH, stamped=True),
        remark=f"{WINDOWED}, capped logits",
    ),
    "mistral4": Family(
        "mistral4",
        {**TEXT, **LATENT, **LATENT_EXPERTS},
        remark="latent attention; text alone, images are mistral3's",
    ),
    "emu3": Family(
        "emu3",
        {
            "text_config": TEXT,
            "vq_config": {**_VQ, "hidden_size": 32, "attn_resolutions": [1], "codebook_size": _VISUAL}
            | {"temporal_downsample_factor": 1},
            "vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": BREAK}
            | {f"<|visual token {number:06d}|>": number + 5 for number in range(_VISUAL)},
        },
        quantised,
    ),
    "chameleon": Family(
        "chameleon",
        {
            **TEXT,
            "vq_config": {**_VQ, "embed_dim": 8, "latent_channels": 8, "num_embeddings": _VISUAL, "resolution": 28},
            "vocabulary_map": {"<image>": IMAGE, **{f"IMGIMG{letter}Z": ord(letter) - 60 for letter in "ABCDEFGHI"}},
        },
    ),
    "minimax_m3_vl": Family("minimax_m3_vl", _minimax("minimax_m3_sparse", "full_attention")),
    "minimax_m3_vl (full attention)": Family(
        "minimax_m3_vl", _minimax("full_attention", "full_attention"), grids(_PATCH), grid_clips(_PATCH)
    ),
    "qwen4_exp": Family(
        "qwen4_exp",
        {
            "text_config": {**TEXT, **EXPERTS, **_LINEAR, "head_dim": 16, "hc_count": 2, "hc_lowrank": 4}
            | {"layer_types": ["linear_attention", "indexed_attention"], "shared_expert_intermediate_size": 16}
            | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
            | {"indexer_compress_ratio": 4},
            "vision_config": QWEN3_TOWER,
            **MARKS,
        },
    ),
    "diffusion_gemma": Family(
        "diffusion_gemma",
        {
            "text_config": {**TEXT, "head_dim": 16, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
            "vision_config": {**VISION, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 4}
            | {"pooling_kernel_size": 2, "model_type": "gemma4_vision"},
            "image_token_id": IMAGE,
        },
    ),
}
