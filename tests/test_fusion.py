"""Fused passes: transformers' own small functions, compiled, for passes of decoding and for no other."""

import copy
import sys

import pytest
import torch
from tiny_models import random_target

from vispec.model import fusion
from vispec.model.passes import decoding_pass

FAMILIES = ("llava_next", "qwen2_5_vl")


@pytest.fixture
def compiled(monkeypatch):
    """Stands in for the compiler: counts the graphs that it is given and runs them as they are."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(fusion, "BACKEND", backend)
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


@pytest.fixture
def decoder(request, monkeypatch):
    """A text decoder, on a CPU as if on a GPU; what `fuse` puts in place of transformers' functions is taken back."""
    monkeypatch.setattr(fusion, "DEVICE", "cpu")
    decoder = random_target(request.param, 0).get_decoder()
    decoder = getattr(decoder, "language_model", decoder)
    for owner, name in replaced(decoder):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return decoder


def replaced(decoder) -> list[tuple[object, str]]:
    layer = decoder.layers[0]
    source = sys.modules[type(layer.self_attn).__module__]
    rotary = [(source, name) for name in fusion.ROTARY_FUNCTIONS if hasattr(source, name)]
    assert rotary
    return [(type(layer.mlp), "forward"), (type(decoder.norm), "forward"), *rotary]


def hidden(decoder, rows: int) -> torch.Tensor:
    with torch.inference_mode():
        x = torch.randn(1, rows, decoder.config.hidden_size, generator=torch.Generator().manual_seed(rows))
        return decoder(inputs_embeds=x, use_cache=False).last_hidden_state


@pytest.mark.parametrize("decoder", FAMILIES, indirect=True)
def test_fused_passes_compute_the_same_and_all_layers_share_what_is_compiled(decoder, compiled):
    expected = {rows: hidden(decoder, rows) for rows in (1, 7, 30)}
    fusion.fuse(decoder)
    assert torch.equal(hidden(decoder, 7), expected[7]) and not compiled, "other passes are left alone"
    with decoding_pass():
        for rows, values in expected.items():
            assert torch.allclose(hidden(decoder, rows), values, atol=1e-6)
        # norm, MLP and rotary embedding, each for one row and for any number of them
        assert len(decoder.layers) > 1 and 3 <= len(compiled) <= 6
        before = len(compiled)
        hidden(decoder, 12)
    assert len(compiled) == before
    assert torch.equal(hidden(decoder, 7), expected[7])


@pytest.mark.parametrize("decoder", FAMILIES[:1], indirect=True)
def test_a_copy_of_a_fused_model_uses_its_own_weights(decoder, compiled):
    fusion.fuse(decoder)
    other = copy.deepcopy(decoder)
    with torch.no_grad():
        other.norm.weight.mul_(2)
    with decoding_pass():
        assert torch.allclose(hidden(other, 5), 2 * hidden(decoder, 5), atol=1e-5)


@pytest.mark.parametrize("decoder", FAMILIES[:1], indirect=True)
def test_without_a_compiler_passes_go_on_unfused_and_say_so_once(decoder, monkeypatch, caplog):
    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    expected = hidden(decoder, 5)
    monkeypatch.setattr(fusion, "BACKEND", backend)
    torch._dynamo.reset()
    fusion.fuse(decoder)
    with decoding_pass():
        for _ in range(2):
            assert torch.equal(hidden(decoder, 5), expected)
    told = [record.getMessage() for record in caplog.records if "unfused" in record.getMessage()]
    assert len(told) == len(replaced(decoder))
    assert all("no compiler here" in line for line in told)


@pytest.mark.parametrize("decoder", FAMILIES[:1], indirect=True)
def test_functions_are_replaced_once(decoder):
    fusion.fuse(decoder)
    first = [getattr(owner, name) for owner, name in replaced(decoder)]
    fusion.fuse(decoder)
    assert [getattr(owner, name) for owner, name in replaced(decoder)] == first


@pytest.mark.parametrize("decoder", FAMILIES[:1], indirect=True)
def test_a_capture_that_fails_is_not_taken_for_a_missing_compiler(decoder, monkeypatch):
    failing = []

    def compile_(stock, **options):
        def compiled(*args, **kwargs):
            if failing:
                raise RuntimeError("operation failed due to a previous error during capture")
            return stock(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    expected = hidden(decoder, 5)
    fusion.fuse(decoder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with decoding_pass():
        failing.append(True)
        with pytest.raises(RuntimeError, match="during capture"):
            hidden(decoder, 5)
        failing.clear()
        assert torch.equal(hidden(decoder, 5), expected)
