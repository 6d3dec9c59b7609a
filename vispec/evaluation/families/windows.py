"""Families whose text decoders are of kinds of their own: windows, chunks, scaled logits, latent attention, experts."""

import torch

from vispec.evaluation.families.family import (
    BREAK,
    END,
    IMAGE,
    START,
    TEXT,
    VIDEO,
    VISION,
    Family,
    Inputs,
    Layout,
    Shown,
)
from vispec.evaluation.families.grids import FLAT, grid_clips, grids
from vispec.evaluation.families.squares import EVERY_OTHER, LAYERS, MARKS, SIGLIP, STOOD_IN, WINDOW, WINDOWED, squares

_COHERE = {**TEXT, **EVERY_OTHER, "model_type": "cohere2", "logit_scale": 0.3}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1, "moe_intermediate_size": 16}
LATENT_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_SHARED = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
_SHARED |= {"head_dim": 16, "num_kv_shared_layers": 2, "sliding_window": WINDOW}
_SHARED |= {"final_logit_softcapping": 5.0, "hidden_size_per_layer_input": 8}
_GEMMA4 = {**TEXT, **_SHARED, "global_head_dim": 32, "vocab_size_per_layer_input": TEXT["vocab_size"]}
_GEMMA3N_AUDIO = {"hidden_size": 32, "vocab_offset": START, "vocab_size": TEXT["vocab_size"] - START}
_GEMMA3N_AUDIO |= {"conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "input_feat_size": 8}
_GEMMA3N_AUDIO |= {"sscp_conv_channel_size": [4, 4]}
_TOWER = {"depth": 1, "hidden_size": 32, "num_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48}
_TOWER |= {"out_hidden_size": 64, "patch_size": 7, "spatial_merge_size": 2, "fullatt_block_indexes": [0]}
CHUNKS = {"attention_chunk_size": WINDOW, "intermediate_size_mlp": 96, "num_local_experts": 2}
CHUNKS |= {"interleave_moe_layer_step": 2, "head_dim": 16}
_LLAMA4_TOWER = {**VISION, "intermediate_size": 128, "vision_output_dim": 32, "image_size": 28, "patch_size": 7}
_LLAMA4_TOWER |= {"projector_input_dim": 32, "projector_output_dim": 32}


def placed(side: int, patch: int) -> Layout:
    """Gemma 4: side x side patches of so many values with their places; an image is 4 tokens."""
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1)

    def layout(sizes: list[int]) -> Shown:
        def inputs(noise: torch.Generator) -> Inputs:
            pixels = torch.rand(len(sizes), side * side, patch, generator=noise)
            return {"pixel_values": pixels, "image_position_ids": places.repeat(len(sizes), 1, 1)}

        return Shown([[START, *[IMAGE] * 4, END] for _ in sizes], inputs)

    return layout


def placed_frames(side: int, patch: int) -> Layout:
    """Its videos: n + 2 such frames, each with a token for its time, those of all videos in one tensor."""

    def layout(sizes: list[int]) -> Shown:
        counts = [size + 2 for size in sizes]
        ids = [[token for number in range(n) for token in (3 + number, START, *[VIDEO] * 4, END)] for n in counts]

        def inputs(noise: torch.Generator) -> Inputs:
            frames = placed(side, patch)([0] * sum(counts)).inputs(noise)
            named = {"pixel_values_videos": frames["pixel_values"], "video_position_ids": frames["image_position_ids"]}
            return {**named, "num_frames_per_video": torch.tensor(counts)}

        return Shown(ids, inputs)

    return layout


FAMILIES = {
    "aya_vision": Family(
        "aya_vision",
        {
            "text_config": _COHERE,
            "vision_config": SIGLIP,
            "downsample_factor": 2,
            **MARKS,
        },
        squares(4, around=True),
        remark=f"{WINDOWED}, scaled logits",
    ),
    "cohere2_vision": Family(
        "cohere2_vision",
        {
            "text_config": _COHERE,
            "vision_config": SIGLIP,
            "downsample_factor": 2,
            "alignment_intermediate_size": 96,
            "image_token_id": IMAGE,
        },
        squares(4, around=True),
        remark=f"{WINDOWED}, scaled logits",
    ),
    "gemma4": Family(
        "gemma4",
        {
            "text_config": _GEMMA4,
            "vision_config": {**VISION, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 4}
            | {"pooling_kernel_size": 2},
            "audio_config": None,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": 1,
        },
        placed(4, 3 * 4 * 4),
        placed_frames(4, 3 * 4 * 4),
        remark=f"{WINDOWED}, embeddings by layer, capped logits",
    ),
    "gemma3n": Family(
        "gemma3n",
        {
            "text_config": {**TEXT, **_SHARED, "vocab_size_per_layer_input": BREAK, "laurel_rank": 4}
            | {"activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4},
            "vision_config": {"hidden_size": 32, "vocab_offset": BREAK, "vocab_size": START - BREAK},
            "audio_config": _GEMMA3N_AUDIO,
            "vision_soft_tokens_per_image": 4,
            "image_token_id": IMAGE,
            "audio_token_id": END,
        },
        squares(4),
        remark=f"{WINDOWED}, embeddings by layer, capped logits; {STOOD_IN}",
    ),
    "llama4": Family(
        "llama4",
        {"text_config": {**TEXT, **LAYERS, **CHUNKS}, "vision_config": _LLAMA4_TOWER, **MARKS},
        squares(4, around=True),
        remark="layers that see chunks of 8 tokens",
    ),
    "exaone4_5": Family(
        "exaone4_5",
        {
            "text_config": {**TEXT, **EVERY_OTHER, "head_dim": 16, "model_type": "exaone4"},
            "vision_config": _TOWER,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
        grids((FLAT,)),
        grid_clips((FLAT,)),
        remark=WINDOWED,
    ),
    "kimi_k25": Family(
        "kimi_k25",
        {
            "text_config": {**TEXT, **LATENT, **LATENT_EXPERTS, "model_type": "deepseek_v3"},
            "vision_config": {**VISION, "patch_size": 7},
            "projection_hidden_size": 32,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "tie_word_embeddings": False,
        },
        grids((3, 7, 7)),
        grid_clips((3, 7, 7), pooled=True),
        remark="latent attention",
    ),
}
