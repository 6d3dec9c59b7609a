"""Families whose text decoders are of kinds of their own: windows, chunks, scaled logits, latent attention, experts."""

import torch

from vispec.evaluation.families.family import END, IMAGE, START, TEXT, VIDEO, VISION, Family, Inputs, Shown
from vispec.evaluation.families.grids import grids
from vispec.evaluation.families.squares import LAYERS, SIGLIP, WINDOW, squares

_WINDOWED = "layers with a window of 8 tokens"
_EVERY_OTHER = {**LAYERS, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": WINDOW}
_COHERE = {**TEXT, **_EVERY_OTHER, "model_type": "cohere2", "logit_scale": 0.3, "sliding_window_pattern": 2}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1, "moe_intermediate_size": 16}
LATENT_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_GEMMA4 = {
    **TEXT,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
_GEMMA4 |= {"head_dim": 16, "global_head_dim": 32, "num_kv_shared_layers": 2, "sliding_window": WINDOW}
_GEMMA4 |= {"final_logit_softcapping": 5.0, "vocab_size_per_layer_input": TEXT["vocab_size"]}
_GEMMA4 |= {"hidden_size_per_layer_input": 8}
_TOWER = {"depth": 1, "hidden_size": 32, "num_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48}
_TOWER |= {"out_hidden_size": 64, "patch_size": 7, "spatial_merge_size": 2, "fullatt_block_indexes": [0]}
_CHUNKS = {"attention_chunk_size": WINDOW, "intermediate_size_mlp": 96, "num_local_experts": 2}
_CHUNKS |= {"interleave_moe_layer_step": 2, "head_dim": 16}
_LLAMA4_TOWER = {**VISION, "intermediate_size": 128, "vision_output_dim": 32, "image_size": 28, "patch_size": 7}
_LLAMA4_TOWER |= {"projector_input_dim": 32, "projector_output_dim": 32}


def placed(sizes: list[int]) -> Shown:
    """Gemma 4: 4 x 4 patches with their places, 2 x 2 to a token."""
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1)

    def inputs(noise: torch.Generator) -> Inputs:
        pixels = torch.rand(len(sizes), 16, 3 * 4 * 4, generator=noise)
        return {"pixel_values": pixels, "image_position_ids": places.repeat(len(sizes), 1, 1)}

    return Shown([[START, *[IMAGE] * 4, END] for _ in sizes], inputs)


FAMILIES = {
    "aya_vision": Family(
        "aya_vision",
        {
            "text_config": _COHERE,
            "vision_config": SIGLIP,
            "downsample_factor": 2,
        }
        | {"image_token_index": IMAGE, "image_token_id": IMAGE},
        squares(4, around=True),
        remark=f"{_WINDOWED}, scaled logits",
    ),
    "cohere2_vision": Family(
        "cohere2_vision",
        {
            "text_config": _COHERE,
            "vision_config": SIGLIP,
            "downsample_factor": 2,
        }
        | {"alignment_intermediate_size": 96, "image_token_id": IMAGE},
        squares(4, around=True),
        remark=f"{_WINDOWED}, scaled logits",
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
        placed,
        remark=f"{_WINDOWED}, embeddings by layer, capped logits",
    ),
    "llama4": Family(
        "llama4",
        {"text_config": {**TEXT, **LAYERS, **_CHUNKS}, "vision_config": _LLAMA4_TOWER, "image_token_index": IMAGE}
        | {"image_token_id": IMAGE},
        squares(4, around=True),
        remark="layers that see chunks of 8 tokens",
    ),
    "exaone4_5": Family(
        "exaone4_5",
        {
            "text_config": {**TEXT, **_EVERY_OTHER, "head_dim": 16, "model_type": "exaone4"},
            "vision_config": _TOWER,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
        grids((3 * 2 * 7 * 7,)),
        remark=_WINDOWED,
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
        remark="latent attention",
    ),
}
