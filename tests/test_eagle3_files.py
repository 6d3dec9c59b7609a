"""Files of EAGLE-3 heads: those of others and ours, and what is wrong with some."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_eagle3 import DRAFT, recorded_target, replace_sizes
from test_tree import CONFIG
from tiny_models import bare_head

from vispec.model.drafts import Eagle3Head, load_draft
from vispec.model.drafts.checkpoints import save_draft


def write(folder: Path, weights: dict, config: dict) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def parts():
    """Tensors and config of a published head."""
    return load_file(DRAFT / "model.safetensors"), json.loads((DRAFT / "config.json").read_text())


def load(folder: Path, **options) -> Eagle3Head:
    table = recorded_target().embed_tokens.weight
    return load_draft(str(folder), embedding=table, **options)


def estimates(head: Eagle3Head) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    hidden = head.project(torch.randn(1, 5, head.fc.in_features, generator=generator))
    embeds = torch.randn(1, 5, head.config.hidden_size, generator=generator)
    return head.logits(head(hidden, embeds, embeds, [[]]))


def test_a_head_that_was_saved_is_the_same(tmp_path, parts):
    head = load(DRAFT, method="eagle3", dtype=torch.float32)
    assert not head.embed_tokens.weight.requires_grad and head.d2t.dtype == torch.int64
    save_draft(head, tmp_path / "head")
    written = load_file(tmp_path / "head" / "model.safetensors")
    assert written.keys() == parts[0].keys() | {"embed_tokens.weight"}
    again = load_draft(str(tmp_path / "head"))
    assert torch.equal(estimates(again), estimates(head)) and again.config == head.config


def test_speculators_format(tmp_path, parts):
    weights, config = parts
    renamed = {name.replace("midlayer.", "layers.0."): value for name, value in weights.items()}
    drafts = config.pop("draft_vocab_size")
    theirs = {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "draft_vocab_size": drafts,
        "norm_before_residual": False, "target_hidden_size": None, "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
        "speculators_config": {"algorithm": "eagle3"}, "transformer_layer_config": config,
    }  # fmt: skip
    expected = load(DRAFT)
    head = load(write(tmp_path / "theirs", renamed, theirs))
    assert torch.equal(estimates(head), estimates(expected))
    assert head.aux_layers(recorded_target()) == (1, 3, 5)
    head.save_pretrained(tmp_path / "ours")
    assert load(tmp_path / "ours").aux_layers(recorded_target()) == (1, 3, 5)
    assert "midlayer.hidden_norm.weight" in load_file(tmp_path / "ours" / "model.safetensors")
    theirs["norm_before_residual"] = True
    normed = estimates(load(write(tmp_path / "normed", renamed, theirs)))
    assert not torch.allclose(normed, estimates(expected))


def test_what_heads_of_others_have_and_lack(tmp_path, parts):
    """`model.` before names (SGLang), no t2d, a norm of each third, biases, an output that no norm comes before."""
    weights, config = parts
    weights.pop("t2d")
    expected = load(DRAFT)
    head = load(write(tmp_path / "plain", {f"model.{name}": value for name, value in weights.items()}, config))
    assert torch.equal(estimates(head), estimates(expected)) and torch.equal(head.t2d, expected.t2d)
    weights |= {f"fc_norm.{third}.weight": torch.full((64,), 2.0) for third in range(3)}
    weights |= {f"midlayer.self_attn.{name}_proj.bias": torch.ones(width) for name, width in (("q", 64), ("k", 32))}
    weights |= {"midlayer.self_attn.v_proj.bias": torch.ones(32), "fc.bias": torch.ones(64)}
    folder = write(tmp_path / "more", weights, config | {"norm_output": False, "architectures": ["x"]})
    head = load(folder)
    assert not torch.allclose(estimates(head), estimates(expected))
    features = torch.randn(3, 192)
    thirds = [2 * third * (third.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() for third in features.split(64, -1)]
    torch.testing.assert_close(head.project(features), torch.cat(thirds, -1) @ weights["fc.weight"].T + 1)
    torch.testing.assert_close(head.logits(features[:, :64]), features[:, :64] @ weights["lm_head.weight"].T)


def test_a_head_that_may_say_everything(tmp_path, parts):
    weights, config = parts
    for name in ("d2t", "t2d"):
        weights.pop(name)
    weights["lm_head.weight"] = torch.randn(128, 64)
    config.pop("draft_vocab_size")
    head = load(write(tmp_path / "head", weights, config))
    assert head.output(recorded_target()).token_ids.tolist() == list(range(128)) and head.t2d.all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d2t": None}, "missing tensor.* d2t"),
        ({"d2t": torch.zeros(48, 2).long()}, r"d2t has shape \(48, 2\), expected one number for each token"),
        ({"d2t": torch.tensor(3)}, "d2t is a single number, expected a tensor of one dimension or more"),
        ({"lm_head.weight": torch.tensor(3.0)}, "lm_head.weight is a single number"),
        ({"d2t": torch.full((48,), 127)}, "d2t leads to tokens from 127 to 174, expected 0 to 127"),
        ({"fc.weight": torch.zeros(64, 128)}, r"fc.weight has shape \(64, 128\), the config asks for \(64, 192\)"),
        ({"midlayer.extra.weight": torch.zeros(2)}, "unexpected tensor.* midlayer.extra.weight"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, parts, changes, message):
    weights = {name: value for name, value in (parts[0] | changes).items() if value is not None}
    with pytest.raises(ValueError, match=f"model.safetensors: {message}"):
        load(write(tmp_path / "head", weights, parts[1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eagle_config": [1, 3, 5]}, r"eagle_config must be dict, found \[1, 3, 5\]"),
        ({"target_hidden_size": -3}, "target_hidden_size must be at least 1, found -3"),
        ({"hidden_size": 10**400}, "hidden_size must be at most 2147483647"),
    ],
)
def test_wrong_values_of_a_config_are_named(tmp_path, parts, changes, message):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        load(write(tmp_path / "head", parts[0], parts[1] | changes))


def test_m_rope_as_transformers_5_writes_it(tmp_path, parts):
    """There it is of type "default"."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    turned = {**rope, "mrope_section": [3, 3, 2]}
    plain = load(write(tmp_path / "plain", parts[0], parts[1] | {"rope_parameters": rope}))
    axes = load(write(tmp_path / "axes", parts[0], parts[1] | {"rope_parameters": turned}))
    assert plain.config.mrope_section is None and axes.config.mrope_section == [3, 3, 2]


def test_other_refusals(tmp_path, parts):
    weights, config = parts
    with pytest.raises(ValueError, match="these are eagle3 weights, method 'eagle2' was asked for"):
        load(DRAFT, method="eagle2")
    with pytest.raises(ValueError, match="mrope_interleaved.* is not known for EAGLE-3 heads"):
        rope = {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
        load(write(tmp_path / "interleaved", weights, config | {"rope_scaling": rope}))
    with pytest.raises(ValueError, match="rope_scaling .* is not supported, a eagle2 head wants null"):
        bare_head(replace_sizes(CONFIG, rope_scaling={"mrope_section": [3, 3, 2]}), "eagle2", 0)
    folder = write(tmp_path / "vocabulary", weights, config)
    (folder / "draft_vocab.safetensors").touch()
    with pytest.raises(ValueError, match="has an output head of its own, so no draft vocabulary holds for it"):
        load(folder)
    assert load(folder, draft_vocab=False).method == "eagle3"
