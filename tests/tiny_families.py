"""The tiny random families of docs/models.md, and LLaVAs over further kinds of text decoders."""

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel

from vispec.evaluation.families.family import BREAK, TEXT, Family, tiny_model
from vispec.evaluation.families.registry import FAMILIES
from vispec.evaluation.families.squares import CLIP, EVERY_OTHER, GEMMA, LAYERS, MARKS, WINDOW, squares
from vispec.evaluation.families.windows import CHUNKS, LATENT, LATENT_EXPERTS

OF_5 = int(transformers.__version__.split(".")[0]) >= 5

WINDOWS = {
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, **GEMMA},
    "gemma3_text": {**EVERY_OTHER, **GEMMA},
    "cohere2": {**EVERY_OTHER, "logit_scale": 0.3},
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "exaone4": EVERY_OTHER,
    "llama4_text": {**CHUNKS, "attn_temperature_tuning": True},
}
"""Layers that see a part of the text."""
SCALES = {
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
}
LATENT_KINDS = {"deepseek_v3": {**LATENT, **LATENT_EXPERTS}}
KINDS = {**WINDOWS, **SCALES, **LATENT_KINDS}


def family_model(family: str | Family, seed: int = 1) -> PreTrainedModel:
    """A random model; skips where this transformers does not have the family."""
    family = FAMILIES[family] if isinstance(family, str) else family
    return tiny_model(family, seed) or pytest.skip(f"this transformers has no {family.model_type}")


def llava_over(kind: str, **changes) -> Family:
    """A LLaVA over a kind of text decoder; skips the test where transformers has none that works."""
    if kind not in CONFIG_MAPPING or (not OF_5 and kind in ("llama4_text", "deepseek_v3")):
        pytest.skip("transformers 4 gives chunks and latent attention to no VLM that is decoded here")
    text = {**TEXT, **LAYERS, "model_type": kind, **KINDS[kind], **changes}
    return Family("llava", {"text_config": text, "vision_config": {**CLIP, "patch_size": 14}, **MARKS}, squares(4))


def let_it_say_marks(model: PreTrainedModel) -> None:
    """Answers of tiny models hold nothing that stands for an image; those of this one may."""
    with torch.no_grad():
        model.get_output_embeddings().weight[BREAK:].normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
