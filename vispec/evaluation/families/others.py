"""Families that fit none of the other layouts, and those that are refused when they are handed over."""

from vispec.evaluation.families.family import BREAK, END, IMAGE, SQUARE, START, TEXT, VIDEO, VISION, VOCABULARY, Family
from vispec.evaluation.families.further import SAM
from vispec.evaluation.families.grids import MARKS, QWEN3_TOWER, QWEN25_TOWER, grid_clips, grids, mrope
from vispec.evaluation.families.squares import LLAMA, QWEN2, SIGLIP, squares
from vispec.evaluation.families.tiles import broken, tiles

_SAM = {**SAM, "output_channels": 32}
_INTERN_TOWER = {**SQUARE, "image_size": [28, 28], "patch_size": [7, 7]}
_TEXT4 = {**TEXT, "model_type": "qwen3", "head_dim": 16}
_HUNYUAN_TOWER = {**VISION, "num_key_value_heads": 4, "out_hidden_size": 64, "text_hidden_size": 64, "patch_size": 7}

FAMILIES = {
    "hunyuan_vl": Family(
        "hunyuan_vl",
        {
            "text_config": {**TEXT, "head_dim": 16, **mrope(2, 2, 2, 2)},
            "vision_config": _HUNYUAN_TOWER,
            "image_token_id": IMAGE,
            "im_start_id": START,
            "im_end_id": END,
            "im_newline_id": BREAK,
        },
        grids((3 * 7 * 7,), lined=True),
    ),
    "aria": Family(
        "aria",
        {
            "text_config": {
                **TEXT,
                "model_type": "aria_text",
                "moe_num_experts": 4,
                "moe_topk": 2,
                "moe_num_shared_experts": 1,
                "head_dim": 16,
            },
            "vision_config": {**SQUARE, "model_type": "idefics3_vision"},
            "projector_patch_to_query_dict": {16: 4},
            "image_token_index": IMAGE,
            "image_token_id": IMAGE,
        },
        squares(4),
    ),
    "janus": Family(
        "janus",
        {
            "text_config": LLAMA,
            "vision_config": {**SQUARE, "projection_dim": 64, "mlp_ratio": 1.5, "num_image_tokens": 16},
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 8,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1],
                "num_res_blocks": 1,
                "num_patches": 4,
                "image_token_embed_dim": 64,
                "projection_dim": 64,
            },
            "image_token_id": IMAGE,
        },
        squares(16),
    ),
    "deepseek_vl": Family(
        "deepseek_vl", {"text_config": LLAMA, "vision_config": SIGLIP, "image_token_id": IMAGE}, squares(16)
    ),
    "got_ocr2": Family(
        "got_ocr2",
        {
            "text_config": QWEN2,
            "vision_config": _SAM,
            "image_seq_length": 1,
            "image_token_index": IMAGE,
            "image_token_id": IMAGE,
        },
        tiles(1, side=64),
        remark="an image of one crop, one of two",
    ),
    "qianfan_ocr": Family(
        "qianfan_ocr",
        {"text_config": _TEXT4, "vision_config": _INTERN_TOWER, "image_seq_length": 4, "image_token_id": IMAGE},
        tiles(4),
    ),
    "ovis2": Family(
        "ovis2",
        {
            "text_config": QWEN2,
            "vision_config": {**SQUARE, "vocab_size": 32, "hidden_stride": 2, "num_visual_indicator_tokens": 2},
            "visual_indicator_token_ids": [START, END],
            "image_token_id": IMAGE,
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
        },
        squares(4, around=True),
    ),
    "lighton_ocr": Family(
        "lighton_ocr",
        {
            "text_config": _TEXT4,
            "vision_config": {**VISION, "head_dim": 8, "image_size": 56, "patch_size": 7, "model_type": "pixtral"},
            "spatial_merge_size": 2,
            "image_token_id": IMAGE,
        },
        broken(14),
    ),
    "hyperclovax_vision_v2": Family(
        "hyperclovax_vision_v2",
        {
            "text_config": {**TEXT, "model_type": "hyperclovax"},
            "vision_config": {**QWEN25_TOWER, "model_type": "qwen2_5_vl_vision"},
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
        grids((3 * 2 * 7 * 7,)),
        grid_clips((3 * 2 * 7 * 7,)),
    ),
    "cosmos3_omni": Family(
        "cosmos3_omni",
        {
            "text_config": {
                **TEXT,
                "head_dim": 16,
                "model_type": "qwen3_vl_text",
                **mrope(2, 3, 3, mrope_interleaved=True),
            },
            "vision_config": {**QWEN3_TOWER, "model_type": "qwen3_vl_vision"},
            **MARKS,
        },
        grids((3 * 2 * 7 * 7,)),
        grid_clips((3 * 2 * 7 * 7,), stamped=True),
    ),
}
