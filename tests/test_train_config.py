"""A draft head's config for any target: the published ones for their targets, sizes that a head can have for others."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, GOLDEN, random_target
from transformers import AutoConfig, LlamaConfig, LlavaConfig, SmolVLMConfig

from vispec import SpecModel
from vispec.evaluation.random_pairs import DRAFT_CONFIGS, TARGETS, target_config
from vispec.model.drafts import ViSpecHead
from vispec.model.drafts.checkpoints import read_config
from vispec.model.loading import load_outline
from vispec.model.target import Target
from vispec.train import config as command

PUBLISHED = {name: sizes for name, sizes in TARGETS.items() if sizes.draft is not None}


def printed(target, capsys) -> dict:
    assert command.main([str(target)]) == 0
    return json.loads(capsys.readouterr().out)


def saved(config, folder):
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configs(name, tmp_path, capsys):
    """Of the text's length a head takes no notice, so the published files may say less than the target."""
    folder = saved(target_config(PUBLISHED[name]), tmp_path)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "config.json").write_text(json.dumps(printed(folder, capsys)))
    ours = read_config(tmp_path / "again" / "config.json")
    theirs = read_config(DRAFT_CONFIGS / PUBLISHED[name].draft)
    ours.max_position_embeddings = theirs.max_position_embeddings
    assert ours == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_that_config_loads_and_decodes(family, tmp_path, capsys):
    target = random_target(family, 0)
    target.save_pretrained(tmp_path / "target")
    (tmp_path / "config.json").write_text(json.dumps(printed(tmp_path / "target", capsys)))
    head = ViSpecHead(read_config(tmp_path / "config.json"), 2)
    assert (head.layers[0].self_attn.q_proj.bias is not None) == family.startswith("qwen")
    head.embed_tokens.weight.data = target.get_input_embeddings().weight.detach()
    head.save_pretrained(tmp_path / "head")
    model = SpecModel.from_pretrained(str(tmp_path / "target"), str(tmp_path / "head"))
    ids = torch.tensor([[5, 6, 7]])
    ours = model.specgenerate(ids, max_new_tokens=8)
    assert torch.equal(ours, model.baseline_generate(ids, max_new_tokens=8))


def small_llava(**text) -> LlavaConfig:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1}
    return LlavaConfig(text_config=LlamaConfig(**sizes | {"vocab_size": 99} | text), image_token_index=98)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({}, {"num_attention_heads": 4, "num_key_value_heads": 4, "qkv_bias": False, "intermediate_size": 96}),
        ({"num_key_value_heads": 2}, {"num_attention_heads": 4, "num_key_value_heads": 4}),
        ({"attention_bias": True, "rms_norm_eps": 1e-4}, {"qkv_bias": True, "rms_norm_eps": 1e-4}),
        ({"rope_theta": 5e5, "hidden_act": "gelu"}, {"rope_theta": 5e5, "hidden_act": "silu"}),
        ({"vocab_size": 123}, {"vocab_size": 123}),
    ],
)
def test_what_a_head_takes_from_its_target(text, expected, tmp_path, capsys):
    found = printed(saved(small_llava(**text), tmp_path), capsys)
    assert found | expected == found
    assert load_outline(str(tmp_path)).get_input_embeddings().weight.is_meta


def test_another_family(tmp_path, capsys):
    text = LlamaConfig(hidden_size=64, num_attention_heads=4, vocab_size=200, pad_token_id=0, num_hidden_layers=1)
    config = SmolVLMConfig(text_config=text.to_dict() | {"model_type": "llama"}, image_token_id=199, pad_token_id=0)
    found = printed(saved(config, tmp_path), capsys)
    assert (found["hidden_size"], found["vocab_size"], found["num_attention_heads"]) == (64, 200, 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "blip", "text_config": {}, "vision_config": {}}, "BlipFor.*: no text decoder with `layers`"),
        ({"model_type": "llama"}, "transformers cannot load it as a target .Unrecognized configuration class"),
        ({"model_type": "no_such"}, "transformers cannot load it as a target .The checkpoint you are trying to load"),
        ({"model_type": "llava"}, "its config has none of .*is it a draft head"),
    ],
)
def test_what_can_have_no_head(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        command.main([str(tmp_path)])
    assert str(caught.value).startswith(f"{tmp_path}: ") and "\n" not in str(caught.value)


def test_an_output_head_of_another_size(tmp_path, monkeypatch):
    target = saved(AutoConfig.from_pretrained(GOLDEN / "llava_next" / "target"), tmp_path)
    outline = load_outline(str(target))
    outline.set_output_embeddings(torch.nn.Linear(64, 40, device="meta"))
    monkeypatch.setattr("vispec.model.loading.load_outline", lambda path: outline)
    with pytest.raises(ValueError, match=r"its output head is \(40, 64\), its embedding \(38, 64\); a head needs them"):
        command.main([str(target)])


def test_sizes_that_no_head_can_take_over(tmp_path):
    target = Target(load_outline(str(saved(small_llava(), tmp_path))), fast=False)
    text = target.text_config.to_dict()
    target.text_config = SimpleNamespace(**text | {"num_attention_heads": 5, "intermediate_size": [96, 128]})
    found = command.draft_config(target)
    assert (found.num_attention_heads, found.num_key_value_heads, found.intermediate_size) == (6, 6, 128)
    target.text_config = SimpleNamespace(**text | {"intermediate_size": None})
    with pytest.raises(ValueError, match="its config has no intermediate_size"):
        command.draft_config(target)
