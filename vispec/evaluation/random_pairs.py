"""Pairs with random weights at published sizes, built on the device: for measuring times without a download.

Time does not depend on what the weights say, so a step and a round take as long as those of the real pair. Acceptance
does depend on it: a random draft head is practically never right.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vispec.cli import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from vispec.model.drafts import BaseHead
    from vispec.model.drafts.config import DraftConfig

DRAFT_CONFIGS = Path(__file__).resolve().parent.parent / "train"

_VICUNA = {"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
_VICUNA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_VICUNA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
_QWEN = {
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_CLIP_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 96,
    "patch_size": 16,
    "projection_dim": 64,
}
_LLAVA = {"image_token_index": 32000, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
_TILES = {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]}
_QWEN_TOKENS = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
_QWEN_TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}


@dataclass(frozen=True)
class Sizes:
    """What the config of a target says."""

    family: str
    """Its `model_type` in transformers."""
    text: dict
    vision: dict
    other: dict
    """Values outside the text and vision configs."""
    draft: str | None = None
    """File of its draft head's config; None takes the sizes of the text decoder."""


TARGETS = {
    "llava-v1.6-vicuna-7b-hf": Sizes(
        "llava_next",
        {**_VICUNA, **_VICUNA_7B},
        _CLIP_LARGE,
        {**_LLAVA, **_TILES},
        "llava_1.6_7B_config.json",
    ),
    "llava-v1.6-vicuna-13b-hf": Sizes(
        "llava_next",
        {**_VICUNA, **_VICUNA_13B},
        _CLIP_LARGE,
        {**_LLAVA, **_TILES},
        "llava_1.6_13B_config.json",
    ),
    "llava-1.5-7b-hf": Sizes("llava", {**_VICUNA, **_VICUNA_7B}, _CLIP_LARGE, _LLAVA, "llava_1.5_7B_config.json"),
    "Qwen2.5-VL-3B-Instruct": Sizes(
        "qwen2_5_vl",
        {
            **_QWEN,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        {**_QWEN_TOWER, "out_hidden_size": 2048},
        _QWEN_TOKENS,
        "qwen2.5_vl_3B_config.json",
    ),
    "Qwen2.5-VL-7B-Instruct": Sizes(
        "qwen2_5_vl",
        {
            **_QWEN,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
        {**_QWEN_TOWER, "out_hidden_size": 3584},
        _QWEN_TOKENS,
        "qwen2.5_vl_7B_config.json",
    ),
    # no published VLM: a text decoder small enough for two CPU cores, behind a vision tower that only fills its place
    "llama-135m": Sizes(
        "llava",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
        _CLIP_TINY,
        {**_LLAVA, "image_token_index": 49151},
    ),
}


def sizes_of(name: str) -> Sizes:
    """The entry of a target, by its name or hub id; raises UserError for an unknown one."""
    sizes = TARGETS.get(name.rsplit("/", 1)[-1])
    if sizes is None:
        raise UserError(f"--random-weights {name}: unknown, expected one of {', '.join(TARGETS)}")
    return sizes


def target_config(sizes: Sizes) -> "PretrainedConfig":
    """transformers' config of a target."""
    from transformers import CONFIG_MAPPING

    text = dict(sizes.text)
    tied = {"tie_word_embeddings": text.get("tie_word_embeddings", False)}
    if sizes.family == "qwen2_5_vl":
        # the text's values stand beside the others in the published file, both versions of transformers read that
        return CONFIG_MAPPING[sizes.family](**text, **sizes.other, vision_config=sizes.vision)
    return CONFIG_MAPPING[sizes.family](
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", **sizes.vision},
        **sizes.other,
        **tied,
    )


def draft_config(sizes: Sizes) -> "DraftConfig":
    """The draft head's config: the published one, or the sizes of the text decoder with a key for every head."""
    from vispec.model.drafts.checkpoints import read_config
    from vispec.model.drafts.config import DraftConfig

    if sizes.draft is not None:
        return read_config(DRAFT_CONFIGS / sizes.draft)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "rms_norm_eps")
    return DraftConfig(
        **{name: sizes.text[name] for name in names}, num_key_value_heads=sizes.text["num_attention_heads"]
    )


def build_target(sizes: Sizes, device: "torch.device", dtype: "torch.dtype") -> "PreTrainedModel":
    """A target with random weights; nothing of it is ever on another device or in another dtype."""
    import torch
    from transformers import AutoModelForImageTextToText

    config = target_config(sizes)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(default)
    randomize(model)
    return model.eval()


def build_draft(sizes: Sizes, target: "PreTrainedModel", draft_vocab: int | None = None) -> "BaseHead":
    """A ViSpec head with random weights and the target's own embedding table.

    Args:
        draft_vocab: how many tokens, no matter which, the head may propose; None: all.
    """
    import torch

    from vispec.model.drafts import build_head
    from vispec.model.drafts.vocabulary import DraftVocabulary

    embedding = target.get_input_embeddings().weight
    head = build_head(draft_config(sizes), "vispec").to(embedding.dtype)
    head.embed_tokens = None  # the largest table is the target's, no memory is taken for a second one
    head.to_empty(device=embedding.device)
    randomize(head)
    head.embed_tokens = target.get_input_embeddings()
    if draft_vocab is not None:
        head.draft_vocab = DraftVocabulary(torch.arange(draft_vocab), embedding.shape[0], fingerprint="")
    return head.eval()


def randomize(module: "nn.Module") -> None:
    """Weights with which every layer keeps the scale of its input, so that logits stay finite and differ."""
    import torch

    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, (weight.numel() / weight.shape[0]) ** -0.5)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            weight.requires_grad_(False)
