"""Families whose images are squares of one size, (N, 3, 28, 28), and get a fixed number of tokens each."""

import torch

from vispec.evaluation.families.family import END, IMAGE, SQUARE, START, TEXT, VIDEO, Family, Inputs, Layout, Shown


def squares(tokens: int, name: str = "pixel_values", around: bool = False, side: int = 28) -> Layout:
    """Images of so many tokens; `around`: with tokens that start and end them."""
    ids = [START, *[IMAGE] * tokens, END] if around else [IMAGE] * tokens

    def layout(sizes: list[int]) -> Shown:
        def inputs(noise: torch.Generator) -> Inputs:
            return {name: torch.randn(len(sizes), 3, side, side, generator=noise)}

        return Shown([ids] * len(sizes), inputs)

    return layout


def clips(frames: int, tokens: int, newline: int = 0) -> Layout:
    """Videos of so many frames, of so many tokens each, in one tensor."""
    ids = [VIDEO] * (frames * tokens + newline)

    def layout(sizes: list[int]) -> Shown:
        def inputs(noise: torch.Generator) -> Inputs:
            return {"pixel_values_videos": torch.randn(len(sizes), frames, 3, 28, 28, generator=noise)}

        return Shown([ids] * len(sizes), inputs)

    return layout


CLIP = {**SQUARE, "model_type": "clip_vision_model"}
SIGLIP = {**SQUARE, "model_type": "siglip_vision_model"}
COARSE = {**SIGLIP, "patch_size": 14}
"""2 x 2 patches."""
TIMM = {"model_type": "timm_wrapper", "architecture": "any"}
STOOD_IN = "a convolution for the tower, which the library timm makes"
LLAMA, MISTRAL, QWEN2 = ({**TEXT, "model_type": kind} for kind in ("llama", "mistral", "qwen2"))
MARKS = {"image_token_index": IMAGE, "image_token_id": IMAGE}
BOTH_MARKS = {**MARKS, "video_token_index": VIDEO, "video_token_id": VIDEO}
WINDOW = 8
LAYERS = {"num_hidden_layers": 4}
EVERY_OTHER = {**LAYERS, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": WINDOW}
EVERY_OTHER |= {"sliding_window_pattern": 2}  # as transformers 4 reads it
WINDOWED = "layers with a window of 8 tokens"
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0}


GRANITE = {"model_type": "granite", "logits_scaling": 4.0, "embedding_multiplier": 2.0}


def _llava(text: dict) -> dict:
    return {"text_config": text, "vision_config": CLIP, **MARKS}


FAMILIES = {
    "llava": Family("llava", _llava(LLAMA), squares(16)),
    "llava (Mistral with a window)": Family("llava", _llava({**MISTRAL, "sliding_window": WINDOW}), squares(16)),
    "llava (Granite)": Family("llava", _llava({**TEXT, **GRANITE}), squares(16), remark="scaled logits"),
    "vipllava": Family("vipllava", {**_llava(LLAMA), "vision_feature_layers": [-1, -2]}, squares(16)),
    "video_llava": Family(
        "video_llava",
        {"text_config": LLAMA, "vision_config": CLIP, **BOTH_MARKS},
        squares(16, "pixel_values_images"),
        clips(8, 17),
    ),
    "fast_vlm": Family(
        "fast_vlm",
        {"text_config": QWEN2, "vision_config": {**TIMM, "hidden_size": 32}, **MARKS},
        squares(4),
        remark=STOOD_IN,
    ),
    "gemma3": Family(
        "gemma3",
        {
            "text_config": {**TEXT, **GEMMA, **EVERY_OTHER},
            "vision_config": COARSE,
            "mm_tokens_per_image": 4,
            "boi_token_index": START,
            "eoi_token_index": END,
            **MARKS,
        },
        squares(4, around=True),
        kinds={"token_type_ids": (IMAGE,)},
        remark=f"{WINDOWED}, capped logits",
    ),
    "paligemma": Family(
        "paligemma",
        {
            "text_config": {**TEXT, "model_type": "gemma", "head_dim": 16},
            "vision_config": {**COARSE, "projection_dim": 64},
            "projection_dim": 64,
            "hidden_size": 64,
            **MARKS,
        },
        squares(4),
        kinds={"token_type_ids": ()},
    ),
    "paligemma (Gemma 2)": Family(
        "paligemma",
        {
            "text_config": {**TEXT, **LAYERS, **GEMMA, "model_type": "gemma2", "sliding_window": WINDOW},
            "vision_config": {**COARSE, "projection_dim": 64},
            "projection_dim": 64,
            "hidden_size": 64,
            **MARKS,
        },
        squares(4),
        kinds={"token_type_ids": ()},
        remark=f"{WINDOWED}, capped logits",
    ),
}
