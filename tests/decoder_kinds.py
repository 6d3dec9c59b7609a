"""Tiny random LLaVAs, each over another kind of text decoder; PaliGemma and Gemma 3, whose images look both ways."""

import pytest
import torch
import transformers
from tiny_models import TEXT_FROM, randomize
from transformers import PreTrainedModel

from vispec.ge_data.batch_generate import collate_prompts

VOCABULARY, IMAGE = 64, 62
PATCHES = 4
WINDOW = 8

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0}
_SIZES |= {"bos_token_id": 1, "eos_token_id": None}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION |= {"image_size": 28, "patch_size": 14}
_OF_5 = int(transformers.__version__.split(".")[0]) >= 5
_EVERY_OTHER = {"layer_types": ["sliding_attention", "full_attention"] * 2} if _OF_5 else {"sliding_window_pattern": 2}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_CHUNKS = {"intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 2}

WINDOWS = {
    "Mistral": {"sliding_window": WINDOW},
    "Gemma2": {"sliding_window": WINDOW, **_GEMMA},
    "Gemma3Text": {"sliding_window": WINDOW, **_EVERY_OTHER, **_GEMMA},
    "Cohere2": {"sliding_window": WINDOW, **_EVERY_OTHER, "logit_scale": 0.3},
    "Qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "Exaone4": {"sliding_window": WINDOW, **_EVERY_OTHER},
    "Llama4Text": {"attention_chunk_size": WINDOW, "attn_temperature_tuning": True, **_CHUNKS},
}
"""Layers that see a part of the text, by the config's class without "Config"."""
SCALES = {
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
}
LATENT = {"DeepseekV3": {"num_key_value_heads": 4, "first_k_dense_replace": 1, **_LATENT, **_EXPERTS}}

_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
_TWO_WIDTHS = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2, "global_head_dim": 16}
_TWO_WIDTHS |= {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "sliding_window": WINDOW, "head_dim": 8}
_TABLES = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "final_logit_softcapping": 5.0}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]}
FAMILIES = {
    "Gemma4": (
        _TWO_WIDTHS | _TABLES,
        {"num_key_value_heads": 2, "head_dim": 8},
        {"audio_config": None, "video_token_id": IMAGE - 1, "audio_token_id": 1},
    ),
    "HunYuanVL": ({"head_dim": 8, "rope_parameters": _ROPE}, {}, {}),
    "Exaone4_5_": (
        WINDOWS["Exaone4"] | {"model_type": "exaone4"},
        {"depth": 1, "num_heads": 2, "out_hidden_size": 32},
        {},
    ),
    "Kimi_K25": (
        LATENT["DeepseekV3"] | {"model_type": "deepseek_v3"},
        {},
        {"video_token_id": IMAGE - 1, "tie_word_embeddings": False},
    ),
}
"""What a family's text config, its vision config and the whole have beside the sizes."""


def target_over(kind: str, seed: int, **changes) -> PreTrainedModel:
    """A LLaVA over a kind of text decoder; skips the test where transformers has none that works."""
    if not _OF_5 and kind in ("Llama4Text", "DeepseekV3"):
        pytest.skip("transformers 4 gives chunks and latent attention to no VLM that is decoded here")
    text = _config(kind, _SIZES | (WINDOWS | SCALES | LATENT)[kind] | changes)
    vision = transformers.CLIPVisionConfig(**_VISION, projection_dim=16)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_token_id=IMAGE, image_seq_length=PATCHES
    )
    return _made(transformers.LlavaForConditionalGeneration(config), seed)


def paligemma(seed: int, kind: str) -> PreTrainedModel:
    text = _SIZES | {"model_type": kind, "head_dim": 8}
    if kind == "gemma2":
        text |= WINDOWS["Gemma2"]
    vision = _VISION | {"projection_dim": 32, "model_type": "siglip_vision_model"}
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=32, hidden_size=32
    )
    return _made(transformers.PaliGemmaForConditionalGeneration(config), seed)


def gemma3(seed: int) -> PreTrainedModel:
    vision = _VISION | {"model_type": "siglip_vision_model"}
    text = _config("Gemma3Text", _SIZES | WINDOWS["Gemma3Text"])
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=PATCHES, image_token_index=IMAGE
    )
    return _made(transformers.Gemma3ForConditionalGeneration(config), seed)


def of_family(name: str, seed: int) -> PreTrainedModel:
    """A whole family that transformers 5 alone has, for prompts of text; its model may say what stands for images."""
    config_class = getattr(transformers, f"{name}Config", None)
    if config_class is None:
        pytest.skip(f"this version of transformers has no {name}")
    text, vision, further = FAMILIES[name]
    config = config_class(text_config=_SIZES | text, vision_config=_TOWER | vision, image_token_id=IMAGE, **further)
    return _made(getattr(transformers, f"{name}ForConditionalGeneration")(config), seed)


def prompt(target: PreTrainedModel, length: int, seed: int, images: int = 1) -> dict[str, torch.Tensor]:
    """What a processor would return for a prompt that begins with its images, a token of text before all but one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(TEXT_FROM, IMAGE - 2, (1, length), generator=generator)
    for image in range(images):
        start = image * (PATCHES + 1)
        ids[:, start : start + PATCHES] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, 28, 28, generator=generator)
    if type(target).__name__.startswith(("Gemma3", "PaliGemma")):
        inputs["token_type_ids"] = (ids == IMAGE).long() if type(target).__name__.startswith("Gemma3") else ids * 0
    return inputs


def batch_of(prompts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What a processor would return for all of them: padded on the left, images one after the other."""
    tokens = [{name: value for name, value in p.items() if value.shape == p["input_ids"].shape} for p in prompts]
    pixels = [p["pixel_values"] for p in prompts if "pixel_values" in p]
    return collate_prompts(tokens, 0) | ({"pixel_values": torch.cat(pixels)} if pixels else {})


def _config(kind: str, values: dict):
    made = getattr(transformers, f"{kind}Config", None)
    if made is None:
        pytest.skip(f"this version of transformers has no {kind}")
    return made(**values)


def _made(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    randomize(model, seed, 0.2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()
