"""Further families, most of them of transformers 5 alone: as data, in the layouts of `layout_models`."""

from collections.abc import Callable

import pytest
import torch
import transformers
from layout_models import (
    BREAK,
    END,
    IMAGE,
    START,
    VOCABULARY,
    Images,
    Layout,
    broken,
    family,
    patch_grids,
    squares,
)
from transformers import PreTrainedModel

TEXT = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIDES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
TOWER = {**SIDES, "intermediate_size": 48}
BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "patch_size": 7}
DEEPSTACK = {**BLOCKS, "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}

IMAGE_ID, IMAGE_INDEX = {"image_token_id": IMAGE}, {"image_token_index": IMAGE}
MEDIA = {"image_token_id": IMAGE, "video_token_id": BREAK}
AROUND = {"image_start_token_id": START, "image_end_token_id": END}
SEEN = {"vision_start_token_id": START, "vision_end_token_id": END}
EVERY_OTHER = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EVERY_OTHER |= {"sliding_window_pattern": 2}  # the same, for transformers 4
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
MARKED = ("mm_token_type_ids",)

FLAT = (3 * 2 * 7 * 7,)
"""A patch of two frames, as Qwen's kin give it."""


def mrope(*sections: int, **more) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}}


def _family(
    name: str,
    text: dict,
    vision: dict,
    images: Callable[[list[int]], Images],
    kinds: tuple[str, ...] = (),
    least: int = 4,
    **further,
) -> Layout:
    """`least`: the oldest transformers under which it is decoded."""

    def build() -> PreTrainedModel:
        if int(transformers.__version__.split(".")[0]) < least:
            pytest.skip(f"{name} needs transformers {least}")
        return family(name, text_config=TEXT | text, vision_config=vision, **further)

    return Layout(build, images, kinds)


def _rows_of_patches(sizes: list[int]) -> Images:
    """HunYuan's: a token ends every row of merged patches, and one stands at either end of an image."""
    made = patch_grids((3 * 7 * 7,), around=False)(sizes)
    sides = ((2, 3), (1, 1))
    ids = [[START, *[IMAGE] * (height * (width + 1) + 2), END] for height, width in (sides[size] for size in sizes)]
    return made._replace(ids=ids)


def _sized(tokens: int) -> Callable[[list[int]], Images]:
    """Squares whose sizes the processor gives too."""
    plain = squares(tokens)

    def images(sizes: list[int]) -> Images:
        made = plain(sizes)
        told = {"image_sizes": torch.tensor([[28, 28]] * len(sizes))}
        return made._replace(inputs=lambda noise: {**made.inputs(noise), **told})

    return images


FURTHER = {
    # images of one size
    "aria": _family(
        "Aria",
        {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "model_type": "aria_text"},
        {**TOWER, "model_type": "idefics3_vision"},
        squares(4),
        **IMAGE_INDEX,
        projector_patch_to_query_dict={16: 4},
    ),
    "aya_vision": _family(
        "AyaVision",
        {**EVERY_OTHER, "logit_scale": 0.3, "model_type": "cohere2"},
        {**TOWER, "model_type": "siglip_vision_model"},
        squares(4),
        **IMAGE_INDEX,
        alignment_intermediate_size=32,
    ),
    "cohere2_vision": _family(
        "Cohere2Vision",
        {**EVERY_OTHER, "logit_scale": 0.3, "model_type": "cohere2"},
        {**TOWER, "model_type": "siglip_vision_model"},
        squares(4),
        **IMAGE_ID,
        alignment_intermediate_size=32,
    ),
    "deepseek_vl": _family(
        "DeepseekVL", {"model_type": "llama"}, {**TOWER, "model_type": "siglip_vision_model"}, squares(16), **IMAGE_ID
    ),
    "janus": _family(
        "Janus",
        {"model_type": "llama"},
        {**SIDES, "mlp_ratio": 2, "projection_dim": 64, "num_image_tokens": 16},
        squares(16),
        **IMAGE_ID,
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "latent_channels": 32,
            "projection_dim": 64,
            "num_patches": 4,
            "image_token_embed_dim": 64,
        },
    ),
    "llama4": _family(
        "Llama4",
        {
            "attention_chunk_size": 8,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "head_dim": 16,
            "no_rope_layers": [1, 0],
        },
        {
            **SIDES,
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        squares(4),
        least=5,
        **IMAGE_INDEX,
    ),
    "ovis2": _family(
        "Ovis2",
        {"model_type": "qwen2"},
        {**TOWER, "vocab_size": 32, "num_visual_indicator_tokens": 2},
        squares(16, around=True),
        **IMAGE_ID,
        visual_indicator_token_ids=[START, END],
        vocab_size=VOCABULARY,
        hidden_size=64,
    ),
    "qianfan_ocr": _family(
        "QianfanOCR",
        {"model_type": "qwen3", "head_dim": 16},
        {**TOWER, "image_size": [28, 28], "patch_size": [7, 7]},
        squares(4, around=True),
        **IMAGE_ID,
        image_seq_length=4,
    ),
    # sizes of their own
    "lighton_ocr": _family(
        "LightOnOcr",
        {"model_type": "qwen3", "head_dim": 16},
        {**TOWER, "image_size": 56, "model_type": "pixtral"},
        broken(14),
        **IMAGE_ID,
    ),
    # grids of patches
    "qwen3_vl_moe": _family(
        "Qwen3VLMoe",
        {**EXPERTS, "num_experts": 4, "head_dim": 16, **mrope(2, 3, 3, mrope_interleaved=True)},
        DEEPSTACK,
        patch_grids(FLAT),
        MARKED,
        **MEDIA,
        **SEEN,
    ),
    "glm4v": _family(
        "Glm4v",
        {"head_dim": 16, **mrope(2, 1, 1, partial_rotary_factor=0.5)},
        {**BLOCKS, "image_size": 28, "out_hidden_size": 64},
        patch_grids(FLAT),
        MARKED,
        **MEDIA,
        **AROUND,
    ),
    "glm46v": _family(
        "Glm46V",
        {"model_type": "glm4v_text", "head_dim": 16, **mrope(2, 1, 1, partial_rotary_factor=0.5)},
        {**BLOCKS, "image_size": 28, "out_hidden_size": 64, "model_type": "glm4v_vision"},
        patch_grids(FLAT),
        MARKED,
        **MEDIA,
        **AROUND,
    ),
    "glm4v_moe": _family(
        "Glm4vMoe",
        {**ROUTED, "head_dim": 16, **mrope(2, 1, 1, partial_rotary_factor=0.5)},
        {**BLOCKS, "image_size": 28, "out_hidden_size": 64},
        patch_grids(FLAT),
        MARKED,
        **MEDIA,
        **AROUND,
    ),
    "glm_ocr": _family(
        "GlmOcr",
        {"head_dim": 16, **mrope(2, 3, 3)},
        {**BLOCKS, "image_size": 28, "out_hidden_size": 64},
        patch_grids(FLAT),
        MARKED,
        **MEDIA,
        **AROUND,
    ),
    "exaone4_5": _family(
        "Exaone4_5_",
        {**EVERY_OTHER, "model_type": "exaone4"},
        {**BLOCKS, "num_key_value_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
        patch_grids(FLAT),
        **MEDIA,
    ),
    "hyperclovax_vision_v2": _family(
        "HyperCLOVAXVisionV2",
        {"model_type": "hyperclovax", "head_dim": 16},
        {**BLOCKS, "out_hidden_size": 64, "fullatt_block_indexes": [0], "model_type": "qwen2_5_vl_vision"},
        patch_grids(FLAT),
        **MEDIA,
    ),
    "cohere_compass": _family(
        "CohereCompass",
        {"rope_parameters": {"full_attention": mrope(2, 3, 3)["rope_parameters"]}},
        DEEPSTACK,
        patch_grids(FLAT),
        MARKED,
        **MEDIA,
        **SEEN,
    ),
    "hunyuan_vl": _family(
        "HunYuanVL",
        {"head_dim": 16, "image_token_id": IMAGE, **mrope(2, 2, 2, 2)},
        {**TOWER, "num_key_value_heads": 4, "out_hidden_size": 64, "text_hidden_size": 64, "spatial_merge_size": 2},
        _rows_of_patches,
        MARKED,
        **IMAGE_ID,
        im_start_id=START,
        im_end_id=END,
        im_newline_id=BREAK,
    ),
    "kimi_k25": _family(
        "Kimi_K25",
        {**LATENT, **ROUTED, "num_key_value_heads": 4, "first_k_dense_replace": 1, "model_type": "deepseek_v3"},
        {**TOWER, "pos_emb_height": 8, "pos_emb_width": 8},
        patch_grids((3, 7, 7)),
        **MEDIA,
        **SEEN,
        projection_hidden_size=32,
        tie_word_embeddings=False,
    ),
}
