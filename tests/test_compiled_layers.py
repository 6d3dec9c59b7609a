"""torch.compile over the layers' small operations, on a CPU as if on a GPU: one compiled function serves all layers."""

import pytest
import torch
from lean_targets import assert_exact, build, features, llava, spec

from vispec.model import text_decoder
from vispec.model.target import Target


@pytest.fixture
def compiled(monkeypatch):
    """Stands in for the compiler: remembers the graphs that it is given, and runs them as they are."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    on_the_cpu(monkeypatch, backend)
    yield graphs
    torch._dynamo.reset()


def on_the_cpu(monkeypatch, backend) -> None:
    monkeypatch.setattr(text_decoder, "COMPILED_ON", "cpu")
    monkeypatch.setattr(text_decoder, "BACKEND", backend)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llava_1.5-llama-biases", "qwen3_vl"])
def test_answers_stay_exact_and_all_layers_share_what_is_compiled(name, compiled):
    model = spec(build(name))
    assert model.target.lean and len(model.target.decoder.layers) > 1
    assert model.target.kernels["small operations"] == "fused"
    # before and behind attention; for one row, for any number of rows, and the head's for nodes at one position
    assert_exact(model)
    assert 0 < len(compiled) <= 9
    before = len(compiled)
    assert_exact(model)
    assert_exact(spec(build(name, seed=1)))
    assert len(compiled) == before


def test_the_number_of_layers_does_not_count(compiled):
    counts = []
    for layers in (2, 5):
        torch._dynamo.reset()
        compiled.clear()
        features(Target(llava(num_hidden_layers=layers)))
        counts.append(len(compiled))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_features_are_those_of_the_stock_decoder(backend, monkeypatch):
    expected = features(Target(llava(attention_bias=True), fast=False))
    on_the_cpu(monkeypatch, backend)
    target = Target(llava(attention_bias=True))
    assert target.lean
    for ours, theirs in zip(features(target), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_changed_weights_are_met(compiled):
    model = spec(llava())
    assert_exact(model)
    model.target.model.load_state_dict(llava(seed=8).state_dict())
    assert_exact(model)
    for parameter in model.target.model.parameters():
        parameter.data = -parameter.data
    assert_exact(model)
    assert model.target.lean


def test_without_a_compiler_layers_run_unfused_and_say_so_once(monkeypatch, caplog):
    def backend(graph, inputs):
        raise RuntimeError("no compiler here\nat all")

    on_the_cpu(monkeypatch, backend)
    model = spec(llava())
    assert model.target.lean
    assert_exact(model)
    assert model.target.kernels["small operations"] == "unfused"
    told = [record.getMessage() for record in caplog.records if "unfused" in record.getMessage()]
    assert told and all("no compiler here" in line and "\n" not in line for line in told)
    before = len(told)
    assert_exact(model)
    assert len([record for record in caplog.records if "unfused" in record.getMessage()]) == before
    torch._dynamo.reset()


def test_a_capture_that_fails_is_not_taken_for_a_missing_compiler(monkeypatch):
    failing = []

    def compile_(stock, **options):
        def fused(*args):
            if failing:
                raise RuntimeError("operation failed due to a previous error during capture")
            return stock(*args)

        return fused

    monkeypatch.setattr(torch, "compile", compile_)
    on_the_cpu(monkeypatch, "eager")
    target = Target(llava())
    expected = features(target)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    failing.append(True)
    with pytest.raises(RuntimeError, match="during capture"):
        features(target)
    failing.clear()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(features(target), expected, strict=True))
