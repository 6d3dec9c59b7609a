"""Models that tree decoding cannot handle are refused by name when they are handed over, not deep inside a prompt."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import family_model
from tiny_models import GOLDEN, random_target

from vispec import SpecModel
from vispec.model.loading import load_target
from vispec.model.windows import READS_LAYER_TYPES


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["full_attention", "linear_attention"], "has linear-attention layers, which keep one state of"),
        (["conv", "full_attention"], "has convolution layers, which keep one state of the whole text"),
        (["full_attention", "indexed_attention"], "has indexed_attention layers; tree decoding knows"),
        pytest.param(
            ["full_attention", "chunked_attention"],
            "has chunked_attention layers, and its config does not say how far they see",
            marks=pytest.mark.skipif(not READS_LAYER_TYPES, reason="this transformers has no layer_types"),
        ),
    ],
)
def test_layers_that_a_tree_does_not_fit_are_refused_by_name(kinds, message):
    target = random_target("llava_next", 0)
    vars(target.config.get_text_config())["layer_types"] = kinds * 2  # past the checks of transformers 5
    with pytest.raises(ValueError, match=f"^{type(target).__name__} {message}"):
        SpecModel(target)


def test_chunks_without_layer_types_are_refused_by_name():
    """So transformers 4 has them, whose masks of chunks fit no cache but its own."""
    target = random_target("llava_next", 0)
    target.config.get_text_config().attention_chunk_size = 8
    with pytest.raises(ValueError, match="^LlavaNextForConditionalGeneration attends in chunks"):
        SpecModel(target)


def test_a_model_that_hides_its_decoder_is_refused():
    class Hidden(torch.nn.Module):
        config = None

        def get_output_embeddings(self):
            return None

    with pytest.raises(ValueError, match="Hidden: no text decoder with `layers` and `embed_tokens` was found"):
        SpecModel(Hidden())


def test_targets_that_count_positions_otherwise_are_refused_by_name():
    target = random_target("llava_next", 0)
    model = SpecModel(target)
    backwards = torch.arange(6).flip(0)[None]
    hook = lambda module, args, kwargs: (args, kwargs | {"position_ids": backwards})  # noqa: E731
    model.target.decoder.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(ValueError, match="^LlavaNextForConditionalGeneration does not count the positions"):
        model.baseline_generate(torch.tensor([[3, 4, 5, 6, 7, 8]]), max_new_tokens=4)


def test_targets_with_cross_attention_are_refused_by_name():
    with pytest.raises(ValueError, match="^MllamaForConditionalGeneration reads its images through cross-attention"):
        SpecModel(family_model("mllama"))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, input_ids, attention_mask, position_ids, past_key_values: None, "does not take inputs_embeds"),
        (lambda self, input_ids, pixel_values, inputs_embeds: None, "merges images inside its text decoder"),
        (lambda self, input_ids, image_embeds, inputs_embeds: None, r"merges images .* \(which takes image_embeds\)"),
    ],
)
def test_decoders_that_cannot_be_called_alone_are_refused_by_name(forward, message):
    target = random_target("llava_next", 0)
    decoder = SpecModel(target).target.decoder
    decoder.__class__ = type("Odd", (type(decoder),), {"forward": forward})
    with pytest.raises(ValueError, match=f"^LlavaNextForConditionalGeneration.*{message}"):
        SpecModel(target)


def test_targets_that_take_no_cache_are_refused_by_name():
    """InstructBLIP of transformers 4."""
    target = random_target("llava_next", 0)
    target.__class__ = type("Odd", (type(target),), {"forward": lambda self, input_ids, pixel_values: None})
    with pytest.raises(ValueError, match=r"^Odd does not hand keys and values to its text decoder \(it takes no past"):
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
