"""Families that read more than images: audio, two towers, questions of their own; some are refused by what they are."""

import torch

from vispec.evaluation.families.family import (
    END,
    IMAGE,
    SQUARE,
    START,
    TEXT,
    TEXT_FROM,
    VIDEO,
    VISION,
    VOCABULARY,
    Family,
    Inputs,
    Shown,
)
from vispec.evaluation.families.grids import EXPERTS, FLAT, MARKS, QWEN3_TOWER, QWEN25_TOWER, grid_clips, grids, mrope
from vispec.evaluation.families.squares import LLAMA, SIGLIP

_PATCH = (FLAT,)
_AUDIO = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16}
_AUDIO |= {"max_source_positions": 16, "output_dim": 64, "downsample_hidden_size": 8}
_OMNI = {"audio_config": _AUDIO, "image_token_index": IMAGE, "video_token_index": VIDEO, "audio_token_index": 1}
_OMNI |= {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": 1, "vision_start_token_id": START}
_OMNI |= {"vision_end_token_id": END, "audio_start_token_id": 2, "audio_end_token_id": 2}
_PHI4_AUDIO = {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2, "input_size": 8}
_PHI4_AUDIO |= dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"), 16)
SAM = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 48}
SAM |= {"image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1]}


def twice(sizes: list[int]) -> Shown:
    """DeepSeek-VL's hybrid: every image in two resolutions."""

    def inputs(noise: torch.Generator) -> Inputs:
        low, high = (torch.randn(len(sizes), 3, side, side, generator=noise) for side in (28, 64))
        return {"pixel_values": low, "high_res_pixel_values": high}

    return Shown([[IMAGE] * 16 for _ in sizes], inputs)


def asked(sizes: list[int]) -> Shown:
    """InstructBLIP: 4 queries to an image, and a question in the words of another model."""

    def inputs(noise: torch.Generator) -> Inputs:
        question = torch.randint(TEXT_FROM, IMAGE, (len(sizes), 6), generator=noise)
        pixels = torch.randn(len(sizes), 3, 28, 28, generator=noise)
        return {
            "pixel_values": pixels,
            "qformer_input_ids": question,
            "qformer_attention_mask": torch.ones_like(question),
        }

    return Shown([[IMAGE] * 4 for _ in sizes], inputs)


FAMILIES = {
    "cohere_compass": Family(
        "cohere_compass",
        {
            "text_config": {
                **TEXT,
                "head_dim": 16,
                "rope_parameters": {"full_attention": mrope(2, 3, 3)["rope_parameters"]},
            },
            "vision_config": QWEN3_TOWER,
            **MARKS,
        },
        grids(_PATCH),
        grid_clips(_PATCH, stamped=True),
    ),
    "qwen2_5_omni_thinker": Family(
        "qwen2_5_omni_thinker",
        {"text_config": {**TEXT, **mrope(2, 3, 3)}, "vision_config": QWEN25_TOWER, **_OMNI},
        grids(_PATCH),
        grid_clips(_PATCH, video_second_per_grid=(1.0, 0.5)),
        remark="no sound",
    ),
    "qwen3_omni_moe_thinker": Family(
        "qwen3_omni_moe_thinker",
        {
            "text_config": {**TEXT, **EXPERTS, "head_dim": 16, **mrope(2, 3, 3, mrope_interleaved=True)},
            "vision_config": QWEN3_TOWER,
            **_OMNI,
        },
        grids(_PATCH),
        grid_clips(_PATCH, video_second_per_grid=(1.0, 0.5)),
        remark="no sound",
    ),
    "deepseek_vl_hybrid": Family(
        "deepseek_vl_hybrid",
        {"text_config": LLAMA, "vision_config": SIGLIP, "high_res_vision_config": SAM, "image_token_id": IMAGE},
        twice,
    ),
    "instructblip (Vicuna)": Family(
        "instructblip",
        {
            "text_config": LLAMA,
            "vision_config": SQUARE,
            "qformer_config": {**VISION, "vocab_size": VOCABULARY, "encoder_hidden_size": 32},
            "num_query_tokens": 4,
            "image_token_index": IMAGE,
        },
        asked,
    ),
    "evolla": Family(
        "evolla",
        {
            **TEXT,
            "protein_encoder_config": VISION,
            "aligner_num_add_layers": 1,
            "resampler_depth": 1,
            "resampler_dim_head": 8,
            "resampler_heads": 2,
            "resampler_num_latents": 4,
        },
        made_by="EvollaForProteinText2Text",
    ),
    "phi4_multimodal": Family(
        "phi4_multimodal",
        {**TEXT, "vision_config": {**SQUARE, "crop_size": 28}, "audio_config": _PHI4_AUDIO},
        made_by="Phi4MultimodalForCausalLM",
    ),
    "vision-encoder-decoder": Family(
        "vision-encoder-decoder",
        {
            "encoder": {**SQUARE, "model_type": "vit"},
            "decoder": {**VISION, "vocab_size": VOCABULARY, "model_type": "bert"},
        },
    ),
    "mllama": Family(
        "mllama",
        {
            "text_config": {**TEXT, "cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}},
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "attention_heads": 2,
                "intermediate_size": 16,
                "vision_output_dim": 32,
                "image_size": 28,
                "patch_size": 14,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
        },
    ),
}
