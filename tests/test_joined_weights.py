"""Joining a target's weights costs no memory, and everybody else still meets the parameters that they had."""

import copy
import io
import pickle

import pytest
import torch
from lean_targets import (
    LowRank,
    assert_exact,
    assert_same_tensors,
    build,
    decoder_of,
    features,
    llava,
    reasons,
    spec,
    storages,
    tensors_of,
)
from tiny_models import text_prompt
from torch import nn
from transformers import AutoModelForImageTextToText

from vispec.model.target import Target
from vispec.model.text_decoder import AGREEMENT

FAMILIES = ("llava_1.5-llama-biases", "qwen2_5_vl", "qwen3_vl")


def joined(*layers: nn.Linear) -> bool:
    """Whether these layers' weights are views of one storage."""
    return len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_become_views_and_take_no_more_memory(name):
    vlm = build(name)
    names, before, held = list(vlm.state_dict()), tensors_of(vlm), sum(storages(vlm).values())
    parameters = {name: id(parameter) for name, parameter in vlm.named_parameters()}
    model = spec(vlm)
    for layer in model.target.decoder.layers:
        attention = layer.self_attn
        assert joined(attention.q_proj, attention.k_proj, attention.v_proj)
        assert joined(layer.mlp.gate_proj, layer.mlp.up_proj)
    assert sum(storages(vlm).values()) == held
    assert {name: id(parameter) for name, parameter in vlm.named_parameters()} == parameters
    assert_exact(model)
    assert list(vlm.state_dict()) == names
    assert_same_tensors(vlm.state_dict(), before)
    assert sum(storages(vlm).values()) == held


def test_two_models_over_one_target_share_its_weights():
    vlm = llava()
    first, other = spec(vlm), spec(vlm)
    held = storages(vlm)
    assert_exact(first)
    assert_exact(other)
    assert storages(vlm) == held


def test_fast_false_and_the_environment_leave_parameters_where_they_are(monkeypatch, caplog):
    vlm = llava()
    before = {name: parameter.data_ptr() for name, parameter in vlm.named_parameters()}
    model = spec(vlm, fast=False)
    monkeypatch.setenv("VISPEC_FAST", "0")
    other = spec(vlm)
    for one in (model, other):
        assert not one.target.lean
        assert_exact(one)
    assert {name: parameter.data_ptr() for name, parameter in vlm.named_parameters()} == before
    assert not reasons(caplog), "nobody is told of what was asked for"


# --- files ---


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_target_has_its_tensors_and_its_size(name, tmp_path):
    vlm = build(name)
    vlm.save_pretrained(tmp_path / "before")
    expected = tensors_of(vlm)
    model = spec(vlm)
    assert_exact(model)
    vlm.save_pretrained(tmp_path / "after")
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("before", "after")]
    assert sizes[0] == sizes[1]
    other = AutoModelForImageTextToText.from_pretrained(tmp_path / "after")
    assert_same_tensors(other.state_dict(), expected)
    assert_exact(spec(other))


def test_a_pickled_target_is_whole():
    model = spec(llava())
    assert_exact(model)
    file = io.BytesIO()
    torch.save(model.target.model, file)
    assert file.tell() < 1.1 * sum(storages(model.target.model).values()) + 200_000
    file.seek(0)
    for other in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model.target.model))):
        assert_same_tensors(other.state_dict(), model.target.model.state_dict())
        assert_exact(spec(other))


# --- weights that change: the next answer is the changed model's ---


def others(vlm) -> dict[str, torch.Tensor]:
    biases = vlm.config.get_text_config().attention_bias
    return llava(seed=9, attention_bias=biases, mlp_bias=biases).state_dict()


def load_others(vlm):
    vlm.load_state_dict(others(vlm))


def replace_the_embeddings(vlm):
    table = vlm.get_input_embeddings()
    vlm.set_input_embeddings(nn.Embedding.from_pretrained(table.weight.flip(0)))


def assign_others(vlm):
    vlm.load_state_dict(others(vlm), assign=True)


def train(vlm):
    optimizer = torch.optim.SGD(vlm.parameters(), lr=0.3)
    for _ in range(2):
        logits = vlm(input_ids=torch.arange(5, 17)[None]).logits
        nn.functional.cross_entropy(logits[0, :-1], torch.arange(6, 17)).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_matrices_alone(vlm):
    with torch.no_grad():
        for layer in decoder_of(vlm).layers:
            layer.mlp.gate_proj.weight.mul_(-2)
            layer.self_attn.v_proj.weight.mul_(-2)


def merge_past_autograd(vlm):
    """As adapters are merged: by `.data`, which leaves no mark on a parameter."""
    generator = torch.Generator().manual_seed(1)
    for layer in decoder_of(vlm).layers:
        weight = layer.self_attn.q_proj.weight
        up, down = (torch.randn(size, 2, generator=generator) for size in weight.shape)
        weight.data += up @ down.T


def train_norms_alone(vlm):
    with torch.no_grad():
        for layer in decoder_of(vlm).layers:
            layer.input_layernorm.weight.mul_(torch.linspace(-2, 2, 64))


def set_norms_alone(vlm):
    for layer in decoder_of(vlm).layers:
        layer.post_attention_layernorm.weight.data = torch.linspace(-2, 2, 64)


def scale_norms_past_autograd(vlm):
    for layer in decoder_of(vlm).layers:
        layer.input_layernorm.weight.data.mul_(torch.linspace(-2, 2, 64))


def train_the_last_norm(vlm):
    with torch.no_grad():
        decoder_of(vlm).norm.weight.mul_(torch.linspace(-2, 2, 64))


def train_the_output_head(vlm):
    with torch.no_grad():
        vlm.get_output_embeddings().weight.mul_(torch.linspace(-2, 2, 38)[:, None])


def set_data(vlm):
    for parameter in vlm.parameters():
        parameter.data = -parameter.data


def replace_a_layer(vlm):
    layers = decoder_of(vlm).layers
    layers[0] = copy.deepcopy(layers[2])
    layers[0].self_attn.layer_idx = 0


def replace_a_linear_layer(vlm):
    mlp = decoder_of(vlm).layers[1].mlp
    mlp.up_proj = nn.Linear(64, 96, bias=mlp.up_proj.bias is not None)


def replace_a_norm(vlm):
    layer = decoder_of(vlm).layers[1]
    norm = copy.deepcopy(layer.input_layernorm)
    norm.weight.data = torch.linspace(-2, 2, 64)
    layer.input_layernorm = norm


CHANGES = (
    load_others, assign_others, train, train_matrices_alone, merge_past_autograd, train_norms_alone,
    set_norms_alone, scale_norms_past_autograd, train_the_last_norm, train_the_output_head, set_data, replace_a_layer,
    replace_a_linear_layer, replace_a_norm, replace_the_embeddings,
)  # fmt: skip


@pytest.mark.parametrize(("kernel", "biases"), [("linear", False), ("onednn", False), ("mkl", False), ("mkl", True)])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_next_answer_is_the_changed_models(change, kernel, biases, kernels, caplog):
    kernels(kernel)
    model = spec(llava(attention_bias=biases, mlp_bias=biases))
    prompt = text_prompt(model.target.model, 9, seed=4)
    before = model.specgenerate(**prompt, max_new_tokens=12)
    change(model.target.model)
    for _ in range(2):
        assert_exact(model)
    assert not torch.equal(model.specgenerate(**prompt, max_new_tokens=12), before), "the change must show"
    assert model.target.lean and not reasons(caplog)


@pytest.mark.parametrize("kernel", ["linear", "onednn", "mkl"])
def test_a_bias_alone_may_change(kernel, kernels):
    kernels(kernel)
    model = spec(llava(attention_bias=True))
    assert_exact(model)
    with torch.no_grad():
        decoder_of(model.target.model).layers[1].self_attn.v_proj.bias.mul_(-30)
    assert_exact(model)
    assert model.target.lean


def test_a_target_may_change_its_dtype_and_back():
    vlm = llava(seed=3)
    target = Target(vlm)
    expected = features(Target(copy.deepcopy(vlm).to(torch.bfloat16), fast=False))
    vlm.to(torch.bfloat16)
    target.prefill(target.new_cache(1, 9), **inputs_of(vlm))
    ours, theirs = (torch.cat([part.flatten() for part in parts]) for parts in (features(target), expected))
    assert target.lean and ours.dtype == torch.bfloat16
    assert (ours - theirs).float().norm() <= AGREEMENT[torch.bfloat16] * theirs.float().norm()
    vlm.to(torch.float32)
    assert_exact(spec(target))


def inputs_of(vlm) -> dict:
    prompt = text_prompt(vlm, 9, seed=4)
    return {"input_ids": prompt.pop("input_ids"), "inputs": prompt}


def test_a_copy_is_a_model_of_its_own():
    model = spec(llava(seed=3))
    assert_exact(model)
    other = copy.deepcopy(model.target.model)
    assert not storages(other).keys() & storages(model.target.model).keys()
    expected = features(model.target)
    load = llava(seed=9).state_dict()
    other.load_state_dict(load)
    assert_exact(spec(other))
    assert all(torch.equal(*pair) for pair in zip(features(model.target), expected, strict=True))


def test_tied_embeddings_stay_tied():
    model = spec(llava(seed=3, tie_word_embeddings=True))
    vlm = model.target.model
    assert vlm.get_output_embeddings().weight is vlm.get_input_embeddings().weight
    assert model.target.lean
    assert_exact(model)
    with torch.no_grad():
        vlm.get_input_embeddings().weight.mul_(torch.linspace(-2, 2, 38)[:, None])
    assert vlm.get_output_embeddings().weight is vlm.get_input_embeddings().weight
    model.draft.embed_tokens.weight.data = vlm.get_input_embeddings().weight.data
    assert_exact(model)


def test_gradients_are_those_of_a_model_that_is_no_target():
    vlm, stock = llava(seed=3), llava(seed=3)
    assert_exact(spec(vlm))
    for model in (vlm, stock):
        logits = model(input_ids=torch.arange(5, 17)[None]).logits
        nn.functional.cross_entropy(logits[0, :-1], torch.arange(6, 17)).backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters() if parameter.grad is not None}
    assert len(gradients) > 20
    for name, parameter in vlm.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.get(name))


# --- a target that becomes of another kind ---


def wrap_a_query_projection(vlm):
    attention = decoder_of(vlm).layers[1].self_attn
    attention.q_proj = LowRank(attention.q_proj)


def wrap_the_output_head(vlm):
    vlm.set_output_embeddings(LowRank(vlm.get_output_embeddings()))


def hook_a_layer(vlm):
    decoder_of(vlm).layers[1].mlp.register_forward_hook(lambda module, args, out: -out)


def hook_the_decoder(vlm):
    def roll(module, args, out):
        out.last_hidden_state = out.last_hidden_state.roll(1, -1)

    decoder_of(vlm).register_forward_hook(roll)


def hook_the_last_norm(vlm):
    decoder_of(vlm).norm.register_forward_hook(lambda module, args, out: -out)


def patch_a_forward(vlm):
    mlp = decoder_of(vlm).layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: -forward(x)


def add_an_attribute(vlm):
    attention = decoder_of(vlm).layers[1].self_attn
    other = copy.deepcopy(attention)
    other.sink_weight = 1.0
    decoder_of(vlm).layers[1].self_attn = other


@pytest.mark.parametrize(
    "change",
    [
        wrap_a_query_projection, wrap_the_output_head, hook_a_layer, hook_the_decoder, hook_the_last_norm,
        patch_a_forward, add_an_attribute,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_a_target_of_another_kind_decodes_by_its_own_layers_from_the_next_prompt_on(change, caplog):
    torch.manual_seed(0)
    model = spec(llava(seed=3))
    assert_exact(model)
    assert model.target.lean and not reasons(caplog)
    change(model.target.model)
    for _ in range(2):
        assert_exact(model)
    assert not model.target.lean
    assert len(reasons(caplog)) == 1


def test_an_adapter_can_be_trained_on_a_target_that_has_decoded():
    torch.manual_seed(0)
    model = spec(llava(seed=3))
    assert_exact(model)
    vlm = model.target.model.requires_grad_(False)
    wrap_a_query_projection(vlm)
    adapter = decoder_of(vlm).layers[1].self_attn.q_proj
    adapter.up.requires_grad_(True)
    logits = vlm(input_ids=torch.arange(5, 17)[None]).logits
    nn.functional.cross_entropy(logits[0, :-1], torch.arange(6, 17)).backward()
    assert adapter.up.weight.grad.abs().max() > 0 and adapter.base_layer.weight.grad is None
    with torch.no_grad():
        adapter.up.weight -= 10 * adapter.up.weight.grad
    assert_exact(model)
    merged = adapter.base_layer
    with torch.no_grad():
        merged.weight += adapter.up.weight @ adapter.down.weight
    decoder_of(vlm).layers[1].self_attn.q_proj = merged
    assert_exact(model)
    assert_exact(spec(vlm))
