"""Packed matrices: the same products up to rounding, in passes of decoding on a CPU and nowhere else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import random_head, random_target
from torch import nn

from vispec import SpecModel
from vispec.model import packing
from vispec.model.packing import PackableLinear, allow_packing
from vispec.model.passes import decoding_pass

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN")


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(48, 80)
    allow_packing(layer)
    return layer


@pytest.fixture
def used(monkeypatch) -> list[int]:
    """How many tokens each product with a packed copy was over."""
    rows, stock = [], PackableLinear._packed_weight

    def packed_weight(self):
        rows.append(self.out_features)
        return stock(self)

    monkeypatch.setattr(PackableLinear, "_packed_weight", packed_weight)
    return rows


@torch.inference_mode()
def decoded(layer: nn.Linear, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """What a pass of decoding computes, and what it should."""
    x = torch.randn(1, rows, layer.in_features, dtype=layer.weight.dtype)
    with decoding_pass():
        return layer(x), F.linear(x, layer.weight, layer.bias)


@pytest.mark.parametrize("rows", [2, 12, 16, 60])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_the_same(layer, used, rows, bias):
    if not bias:
        layer.bias = None
    found, expected = decoded(layer, rows)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert used


def test_one_token_and_other_passes_do_not_use_the_copy(layer, used):
    found, expected = decoded(layer, 1)
    assert torch.equal(found, expected)
    x = torch.randn(3, 5, 48, requires_grad=True)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert layer.weight.grad is not None and not used


def test_weights_may_change(layer):
    decoded(layer)
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(*decoded(layer), rtol=1e-5, atol=1e-5)
    layer.load_state_dict(nn.Linear(48, 80).state_dict())
    torch.testing.assert_close(*decoded(layer), rtol=1e-5, atol=1e-5)
    layer.weight = nn.Parameter(torch.randn(80, 48))
    torch.testing.assert_close(*decoded(layer), rtol=1e-5, atol=1e-5)
    layer.to(torch.float16)
    torch.testing.assert_close(*decoded(layer))


def test_a_copy_of_a_layer_has_its_own_weight(layer):
    decoded(layer)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
    found, expected = decoded(other)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, other.bias.expand_as(found))


def test_large_models_and_other_kinds_of_layers_are_left_alone(monkeypatch):
    class Quantised(nn.Linear):
        pass

    layers = nn.ModuleList([nn.Linear(8, 8), Quantised(8, 8), nn.Linear(8, 8, dtype=torch.float64)])
    monkeypatch.setattr(packing, "MOST_BYTES", 8 * 8 * 4 - 1)
    allow_packing(layers)
    assert [type(layer) for layer in layers] == [nn.Linear, Quantised, nn.Linear]
    monkeypatch.setattr(packing, "MOST_BYTES", 8 * 8 * 4)
    allow_packing(layers)
    assert [type(layer) for layer in layers] == [PackableLinear, Quantised, nn.Linear]


def test_rounds_use_it_in_target_and_draft_and_the_baseline_does_not(used):
    target = random_target("llava_next", seed=1)
    model = SpecModel(target, random_head(target, "vispec", seed=2), total_token=8, depth=2, top_k=3)
    prompt = {"input_ids": torch.arange(5, 17)[None], "max_new_tokens": 12}
    plain = model.baseline_generate(**prompt)
    assert not used
    assert torch.equal(model.specgenerate(**prompt), plain)
    vocabulary = target.config.get_text_config().vocab_size
    draft_sizes = {model.draft.fc.out_features, vocabulary}
    assert draft_sizes <= set(used) and target.get_decoder().layers[0].mlp.gate_proj.out_features in used


def test_state_dicts_stay_as_they_are():
    target = random_target("llava_next", seed=1)
    names, kind = list(target.state_dict()), type(target)
    SpecModel(target, random_head(target, "vispec", seed=2))
    assert list(target.state_dict()) == names and type(target) is kind
