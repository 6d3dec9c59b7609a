"""Models that tree decoding cannot handle are refused by name when they are handed over, not deep inside a prompt."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import GOLDEN, random_target
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

from vispec import SpecModel
from vispec.model.loading import load_target


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2_5_vl", {"sliding_window": 16, "use_sliding_window": True}, "sliding window of 16 tokens"),
        ("llava_next", {"sliding_window": 16}, "sliding window of 16 tokens"),
        ("llava_next", {"layer_types": ["full_attention", "chunked_attention"] * 2}, "has chunked_attention layers"),
        ("llava_next", {"final_logit_softcapping": 30.0}, "rescales logits"),
        ("llava_next", {"logits_scaling": 8.0}, "rescales logits"),
    ],
)
def test_targets_that_a_tree_does_not_fit_are_refused_by_name(family, changes, message):
    target = random_target(family, 0)
    for name, value in changes.items():
        setattr(target.config.get_text_config(), name, value)
    with pytest.raises(ValueError, match=f"{type(target).__name__} .*{message}"):
        SpecModel(target)


def test_a_model_that_hides_its_decoder_is_refused():
    class Hidden(torch.nn.Module):
        config = None

        def get_output_embeddings(self):
            return None

    with pytest.raises(ValueError, match="Hidden: no text decoder with `layers` and `embed_tokens` was found"):
        SpecModel(Hidden())


def tiny_mllama() -> torch.nn.Module:
    text = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "cross_attention_layers": [1]}
    text |= {"rope_scaling": {"rope_type": "default"}}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2}
    vision |= {"intermediate_size": 16, "vision_output_dim": 32, "image_size": 28, "patch_size": 14}
    vision |= {"intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
    return MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))


def test_targets_that_count_positions_otherwise_are_refused_by_name():
    text = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "model_type": "gemma"}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"image_size": 28, "patch_size": 14, "projection_dim": 32, "model_type": "siglip_vision_model"}
    config = PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=39, projection_dim=32)
    model = SpecModel(PaliGemmaForConditionalGeneration(config))
    inputs = {"input_ids": torch.tensor([[39] * 4 + [5, 6]]), "pixel_values": torch.zeros(1, 3, 28, 28)}
    with pytest.raises(ValueError, match="^PaliGemmaForConditionalGeneration does not count the positions"):
        model.baseline_generate(**inputs, attention_mask=torch.ones(1, 6, dtype=torch.long), max_new_tokens=4)


def test_targets_with_cross_attention_are_refused_by_name():
    with pytest.raises(ValueError, match="^MllamaForConditionalGeneration reads its images through cross-attention"):
        SpecModel(tiny_mllama())


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, input_ids, attention_mask, position_ids, past_key_values: None, "does not take inputs_embeds"),
        (lambda self, input_ids, pixel_values, inputs_embeds: None, "merges images inside its text decoder"),
    ],
)
def test_decoders_that_cannot_be_called_alone_are_refused_by_name(forward, message):
    target = random_target("llava_next", 0)
    decoder = SpecModel(target).target.decoder
    decoder.__class__ = type("Odd", (type(decoder),), {"forward": forward})
    with pytest.raises(ValueError, match=f"^LlavaNextForConditionalGeneration.*{message}"):
        SpecModel(target)


def test_targets_without_positions_or_head_are_refused_by_name():
    target = random_target("llava_next", 0)
    vars(target.config.get_text_config())["max_position_embeddings"] = None  # past the checks of transformers 5
    with pytest.raises(ValueError, match="^LlavaNextForConditionalGeneration .*no max_position_embeddings"):
        SpecModel(target)
    target = random_target("llava_next", 0)
    target.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="^LlavaNextForConditionalGeneration has no output head"):
        SpecModel(target)


# --- files that are no target ---


@pytest.mark.parametrize("path", ["someone/nowhere", "/nowhere/at/all"])
def test_a_target_that_is_not_there(path):
    with pytest.raises(ValueError) as caught:
        load_target(path)
    assert str(caught.value).startswith(f"{path}: transformers cannot load it as a target (")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_a_draft_head_is_no_target(family):
    """Its config says that it is a VLM, and nothing of how large one: transformers would build the default size."""
    draft = str(GOLDEN / family / "draft_vispec")
    with pytest.raises(ValueError, match="its config has none of .*vision_config; is it a draft head") as caught:
        SpecModel.from_pretrained(draft, draft)
    assert str(caught.value).startswith(f"{draft}: ")


def test_a_target_whose_files_lack_a_tensor_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "llava_next" / "target", tmp_path / "target")
    weights = load_file(tmp_path / "target" / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    del weights[name]
    save_file(weights, tmp_path / "target" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"target: the target's files lack 1 of its tensors \(.*mlp.up_proj"):
        load_target(str(tmp_path / "target"))
