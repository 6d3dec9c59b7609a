"""ViSpec heads of NeMo AutoModel: their names, their config, and their two norms more."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import GOLDEN, generate, image_prompt

from vispec import SpecModel
from vispec.model.drafts import load_draft
from vispec.train.start import _loaded_head

DRAFT = GOLDEN / "qwen2_5_vl" / "draft_vispec"


@pytest.fixture
def nemo(tmp_path):
    """A recorded head as NeMo would write it."""
    weights = load_file(DRAFT / "model.safetensors")
    weights["img_adaptor.query"] = weights.pop("imadpt.q")
    weights = {name.replace("imadpt.", "img_adaptor."): tensor for name, tensor in weights.items()}
    size = len(weights["fc.bias"])
    weights |= {"layers.0.input_layernorm.weight": torch.ones(size), "norm.weight": torch.full((size,), 2.0)}
    save_file(weights, tmp_path / "model.safetensors")
    config = json.loads((DRAFT / "config.json").read_text()) | {
        "architectures": ["VispecDraftModel"], "num_hidden_layers": 28, "draft_num_hidden_layers": 1, "fc_bias": True,
        "head_dim": 16, "vispec_num_query_tokens": 3, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_head_of_nemo_loads_and_is_saved_as_ours(nemo, tmp_path):
    head, published = load_draft(str(nemo)), load_draft(str(DRAFT))
    assert (head.method, head.num_q, head.config.num_hidden_layers, head.config.rope_scaling) == ("vispec", 3, 1, None)
    state = head.state_dict()
    assert state.keys() - published.state_dict().keys() == {"layers.0.input_layernorm.weight", "norm.weight"}
    assert all(torch.equal(state[name], tensor) for name, tensor in published.state_dict().items())
    head.save_pretrained(tmp_path / "ours")
    again = load_draft(str(tmp_path / "ours")).state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_the_final_norm_stands_before_the_output_head_only(nemo):
    class Target:
        logits, expect_logits = staticmethod(lambda hidden: hidden), None

    head = load_draft(str(nemo))
    estimate = torch.randn(3, head.config.hidden_size)
    assert torch.equal(head.output(Target).logits(estimate), head.norm(estimate))
    assert load_draft(str(DRAFT)).output(Target).logits(estimate) is estimate


@pytest.mark.parametrize("fast", [True, False])
def test_greedy_answers_are_the_targets(nemo, fast):
    model = SpecModel.from_pretrained(str(GOLDEN / "qwen2_5_vl" / "target"), str(nemo), tree="12/3/4", fast=fast)
    inputs = image_prompt(model.target.model, 0, ".a.b.")
    plain = generate(model.target.model, inputs, max_new_tokens=20)
    assert torch.equal(model.specgenerate(**inputs, max_new_tokens=20), plain)


def test_a_config_that_names_no_architectures(nemo):
    config = json.loads((DRAFT / "config.json").read_text()) | {"architectures": 5}
    (nemo / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unexpected"):
        load_draft(str(nemo))


def test_another_scaling_of_positions_is_refused(nemo):
    config = json.loads((nemo / "config.json").read_text()) | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    (nemo / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rope_scaling .* is not supported"):
        load_draft(str(nemo))


def test_training_does_not_go_on_with_one(nemo):
    with pytest.raises(ValueError, match="--loadpath .* final norm is not trained here"):
        table = load_draft(str(nemo)).embed_tokens.weight.detach()
        _loaded_head(SimpleNamespace(loadpath=str(nemo)), "vispec", None, table, None)
