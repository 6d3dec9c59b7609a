"""Packed matrices: the same products up to rounding, in passes of decoding on a CPU and nowhere else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, generate, image_prompt, random_head, random_target
from torch import nn

from vispec import SpecModel
from vispec.model import packing
from vispec.model.packing import Joined, PackableLinear, allow_packing, expect_new_weights
from vispec.model.passes import decoding_pass

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN")


def pays_from(monkeypatch, numbers: int) -> None:
    monkeypatch.setattr(packing, "LEAST_NUMBERS", dict.fromkeys(packing.LEAST_NUMBERS, numbers))


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch):
    pays_from(monkeypatch, 0)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(48, 80)
    allow_packing(layer)
    return layer


@pytest.fixture
def packed(monkeypatch) -> list[tuple[int, ...]]:
    """The sizes of the matrices that were packed, in order."""
    sizes, stock = [], packing._pack

    def pack(weight):
        sizes.append(tuple(weight.shape))
        return stock(weight)

    monkeypatch.setattr(packing, "_pack", pack)
    return sizes


@torch.inference_mode()
def decoded(layer: nn.Linear, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """What a pass of decoding computes after a new prompt, and what it should."""
    expect_new_weights()
    x = torch.randn(1, rows, layer.in_features, dtype=layer.weight.dtype)
    with decoding_pass():
        return layer(x), F.linear(x, layer.weight, layer.bias)


@pytest.mark.parametrize("rows", [1, 2, 12, 16, 60])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_the_same_and_a_matrix_is_packed_once(layer, packed, rows, bias):
    if not bias:
        layer.bias = None
    for _ in range(3):
        found, expected = decoded(layer, rows)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert packed == [(80, 48)]


def test_other_passes_do_not_use_the_copy(layer, packed):
    x = torch.randn(3, 5, 48, requires_grad=True)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert layer.weight.grad is not None and not packed


def test_autocast_is_left_to_the_stock_product(layer):
    x = torch.randn(1, 6, 48)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), decoding_pass():
        found = layer(x.bfloat16())
        assert found.dtype == torch.bfloat16 and torch.equal(found, F.linear(x, layer.weight, layer.bias))


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


def test_a_layer_that_has_a_copy_can_be_pickled(layer, tmp_path):
    decoded(layer)
    torch.save(layer, tmp_path / "layer.pt")
    other = torch.load(tmp_path / "layer.pt", weights_only=False)
    torch.testing.assert_close(*decoded(other), rtol=1e-5, atol=1e-5)


def test_large_models_small_matrices_and_other_kinds_of_layers_are_left_alone(monkeypatch):
    class Quantised(nn.Linear):
        pass

    layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 7), Quantised(8, 8), nn.Linear(8, 8, dtype=torch.float64)])
    kinds = [nn.Linear, nn.Linear, Quantised, nn.Linear]
    pays_from(monkeypatch, 64)
    monkeypatch.setattr(packing, "MOST_BYTES", 8 * 8 * 4 - 1)
    allow_packing(layers)
    assert [type(layer) for layer in layers] == kinds
    monkeypatch.setattr(packing, "MOST_BYTES", 8 * 8 * 4)
    allow_packing(layers)
    assert [type(layer) for layer in layers] == [PackableLinear, *kinds[1:]]


@torch.inference_mode()
def joined(join: Joined, layers: list[nn.Linear], rows: int = 6) -> None:
    """Compare what a pass of decoding computes with what the layers do."""
    expect_new_weights()
    x = torch.randn(1, rows, layers[0].in_features, dtype=layers[0].weight.dtype)
    with decoding_pass():
        found = join(x, *layers)
    torch.testing.assert_close(list(found), [F.linear(x, y.weight, y.bias) for y in layers], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("least", [0, 10**9])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_over_one_input_become_one_product(packed, monkeypatch, least, bias):
    pays_from(monkeypatch, least)
    torch.manual_seed(0)
    layers = [nn.Linear(48, n, bias=bias) for n in (80, 16, 24)]
    join = Joined()
    for rows in (1, 3, 12):
        joined(join, layers, rows)
    assert packed == ([(120, 48)] if least == 0 else [])
    with torch.no_grad():
        layers[1].weight.mul_(2)
    joined(join, layers)
    layers[2] = nn.Linear(48, 30, bias=bias)
    joined(join, layers)
    other = copy.deepcopy(join)
    with torch.no_grad():
        layers[0].weight.zero_()
    joined(other, layers)
    joined(join, layers)


def test_other_passes_and_other_kinds_of_layers_are_not_joined(packed):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, join = torch.randn(1, 6, 48, requires_grad=True), Joined()
    layers = [nn.Linear(48, 80), Doubled(48, 16)]
    expect_new_weights()
    with torch.inference_mode(), decoding_pass():
        for found, layer in zip(join(x, *layers), layers, strict=True):
            assert torch.equal(found, layer(x))
    layers[1] = nn.Linear(48, 16)
    sum(part.sum() for part in join(x, *layers)).backward()
    assert all(layer.weight.grad is not None for layer in layers) and not packed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["vispec", "eagle2", "medusa"])
def test_both_arms_use_it_and_say_what_generate_says(packed, family, method):
    target = random_target(family, seed=1)
    prompt = image_prompt(target, 0, "a.b")
    expected = generate(target, prompt, max_new_tokens=24)
    model = SpecModel(target, random_head(target, method, seed=2), total_token=8, depth=2, top_k=3)
    assert torch.equal(model.baseline_generate(**prompt, max_new_tokens=24), expected)
    of_target = len(packed)
    assert torch.equal(model.specgenerate(**prompt, max_new_tokens=24), expected)
    assert of_target > 7 and len(packed) > of_target
    assert torch.equal(generate(target, prompt, max_new_tokens=24), expected)


def test_state_dicts_stay_as_they_are():
    target = random_target("llava_next", seed=1)
    names = list(target.state_dict())
    model = SpecModel(target, random_head(target, "vispec", seed=2))
    model.specgenerate(torch.arange(5, 17)[None], max_new_tokens=4)
    assert list(target.state_dict()) == names
