"""The lean pass takes the decoders that it knows, agrees with them, and leaves all others to transformers."""

import copy
import re

import pytest
import torch
from lean_targets import BUILDERS, assert_exact, build, decoder_of, features, llava, reasons, spec
from tiny_models import generate, image_prompt, random_head, text_prompt
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from vispec import SpecModel
from vispec.model.target import Target
from vispec.model.text_decoder import AGREEMENT

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# --- what is taken ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_a_known_family_is_taken_and_features_agree(name, dtype, caplog):
    model = build(name, seed=1, dtype=dtype)
    expected = features(Target(copy.deepcopy(model), fast=False))
    target = Target(model)
    assert target.lean and not reasons(caplog)
    found = features(target)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == dtype
    ours, theirs = (torch.cat([part.flatten() for part in parts]).float() for parts in (found, expected))
    assert (ours - theirs).norm() <= AGREEMENT[dtype] * theirs.norm()


@pytest.mark.parametrize("name", BUILDERS)
def test_answers_of_both_arms_are_generates(name):
    model = spec(build(name, seed=2))
    assert model.target.lean
    assert_exact(model, tokens=24)
    if name.startswith(("llava", "qwen")):
        assert_exact(model, image_prompt(model.target.model, 0, "a.b."), tokens=24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_arms_say_the_same_as_each_other(dtype):
    model = spec(build("qwen2_5_vl", seed=3, dtype=dtype))
    prompt = image_prompt(model.target.model, 0, "a.")
    prompt["pixel_values"] = prompt["pixel_values"].to(dtype)
    lengths = [arm(**prompt, max_new_tokens=16).shape for arm in (model.baseline_generate, model.specgenerate)]
    assert lengths[0] == lengths[1] == (1, prompt["input_ids"].shape[1] + 16)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {
            "rope_type": "longrope", "factor": 4.0, "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [2.0 + i for i in range(8)], "original_max_position_embeddings": 128,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_scaled_angles_are_the_stock_modules(rope):
    expected = features(Target(llava(rope_scaling=rope), fast=False))
    model = spec(llava(rope_scaling=rope))
    assert model.target.lean
    for ours, theirs in zip(features(model.target), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert_exact(model)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu", "silu"])
def test_other_gated_activations_agree(activation):
    model = spec(llava(hidden_act=activation))
    assert model.target.lean
    assert_exact(model)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2)])
def test_any_grouping_of_heads_agrees(heads):
    model = spec(llava(num_attention_heads=heads[0], num_key_value_heads=heads[1]))
    assert model.target.lean
    assert_exact(model)


def test_eager_targets_are_taken_too():
    model = spec(llava(attention="eager"))
    layer = model.target.decoder.layers[0]
    assert layer.self_attn.config._attn_implementation == "eager"
    assert model.target.lean
    assert_exact(model)


def test_autocast_decodes_by_the_stock_layers():
    model = llava()
    with torch.autocast("cpu", torch.bfloat16):
        expected = features(Target(copy.deepcopy(model), fast=False))
        for ours, theirs in zip(features(Target(model)), expected, strict=True):
            assert torch.equal(ours, theirs)


# --- what is not taken: one line says why, and answers stay exact ---


def attention_with_an_attribute(model, layer):
    layer.self_attn.sink_weight = 1.0


def attention_with_another_part(model, layer):
    layer.self_attn.gate = nn.Linear(4, 4)


def layer_with_another_part(model, layer):
    layer.post_feedforward_layernorm = nn.Identity()


def mlp_with_another_part(model, layer):
    layer.mlp.router = nn.Identity()


class FarScaled(LlamaAttention):
    """Scales its queries otherwise behind position 400."""

    def forward(self, *args, **kwargs):
        self.scaling = self.head_dim**-0.5 * (3 if kwargs["position_ids"].max() > 400 else 1)
        return super().forward(*args, **kwargs)


def queries_scaled_far_from_the_beginning(model, layer):
    layer.self_attn.__class__ = FarScaled


class ScaledFromOneOn(LlamaRMSNorm):
    """As Gemma's: the weight is what is added to 1."""

    def forward(self, x):
        return super().forward(x) * (1 + self.weight) / self.weight


def norm_that_adds_one(model, layer):
    layer.input_layernorm.__class__ = ScaledFromOneOn


def norm_of_another_kind(model, layer):
    layer.post_attention_layernorm = nn.LayerNorm(64)


class LastNorm(nn.Module):
    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True)


def last_norm_without_a_weight(model, layer):
    decoder_of(model).norm = LastNorm()


class Rounded(nn.Linear):
    """Stands for a quantised layer."""

    def forward(self, x):
        return nn.functional.linear(x, (self.weight * 8).round() / 8, self.bias)


def quantised_layer(model, layer):
    layer.mlp.up_proj.__class__ = Rounded


def quantised_head(model, layer):
    model.get_output_embeddings().__class__ = Rounded


def hook_on_a_layer(model, layer):
    layer.register_forward_hook(lambda module, args, out: (out[0] * 1.5, *out[1:]) if type(out) is tuple else out * 1.5)


def hook_on_a_norm(model, layer):
    layer.input_layernorm.register_forward_hook(lambda module, args, out: out * 1.5)


def hook_on_the_last_norm(model, layer):
    decoder_of(model).norm.register_forward_hook(lambda module, args, out: out.roll(1, -1))


def hook_on_the_decoder(model, layer):
    def roll(module, args, out):
        out.last_hidden_state = out.last_hidden_state.roll(1, -1)

    decoder_of(model).register_forward_hook(roll)


def patched_forward(model, layer):
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: 1.5 * forward(x)


class WideNormed(LlamaAttention):
    """Normalises its values in all heads together."""

    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(self.q_norm(hidden_states), *args, **kwargs)


def query_norm_over_all_heads(model, layer):
    layer.self_attn.__class__ = WideNormed
    layer.self_attn.q_norm, layer.self_attn.k_norm = LlamaRMSNorm(64), LlamaRMSNorm(64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (attention_with_an_attribute, "LlamaAttention has sink_weight"),
        (attention_with_another_part, r"LlamaAttention is built otherwise \(gate\)"),
        (layer_with_another_part, r"LlamaDecoderLayer is built otherwise \(post_feedforward_layernorm\)"),
        (mlp_with_another_part, r"LlamaMLP is built otherwise \(router\)"),
        (queries_scaled_far_from_the_beginning, r"LlamaModel differs from it by .* at position 500"),
        (norm_that_adds_one, "LlamaModel differs from it by .* at position 0"),
        (norm_of_another_kind, "LayerNorm is no RMSNorm"),
        (last_norm_without_a_weight, "LastNorm is no RMSNorm"),
        (quantised_layer, "a linear layer is a Rounded"),
        (quantised_head, "a linear layer is a Rounded"),
        (hook_on_a_layer, "LlamaDecoderLayer has hooks"),
        (hook_on_a_norm, "LlamaRMSNorm has hooks"),
        (hook_on_the_last_norm, "LlamaRMSNorm has hooks"),
        (hook_on_the_decoder, "the text decoder has hooks"),
        (patched_forward, "LlamaMLP has hooks"),
        (query_norm_over_all_heads, "the lean pass of LlamaModel fails .*size of tensor"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_decoder_is_left_to_its_own_layers(change, reason, caplog):
    model = llava(seed=5)
    change(model, decoder_of(model).layers[1])
    model = spec(model)
    assert not model.target.lean
    (line,) = reasons(caplog)
    assert re.search(reason, line), line
    assert_exact(model)
    assert len(reasons(caplog)) == 1


def test_an_offloaded_target_is_left_to_its_own_layers(caplog):
    accelerate = pytest.importorskip("accelerate")
    model = llava(seed=5)
    expected = generate(model, text_prompt(model, 9, seed=4), max_new_tokens=12)
    draft = random_head(model, "eagle2", seed=7)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    model = SpecModel(model, draft, total_token=8, depth=2, top_k=3)
    assert not model.target.lean and len(reasons(caplog)) == 1
    assert_exact(model)
    prompt = text_prompt(model.target.model, 9, seed=4)
    assert torch.equal(model.specgenerate(**prompt, max_new_tokens=12), expected)


def test_a_target_over_several_devices_is_left_to_its_own_layers(caplog):
    """torch.device("cpu", 0) is another device than torch.device("cpu"), and the same memory."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = llava(seed=5)
    layers = decoder_of(model).layers
    for number, layer in enumerate(layers):
        device = torch.device("cpu", 0) if number == 1 else torch.device("cpu")
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(device, skip_keys="past_key_values"))
    model = spec(model)
    assert not model.target.lean
    (line,) = reasons(caplog)
    assert "spread over devices" in line
    assert_exact(model)


def test_weights_made_in_inference_mode_are_left_to_their_own_layers(caplog):
    with torch.inference_mode():
        model = llava(seed=5)
        model = spec(model)
    assert not model.target.lean
    (line,) = reasons(caplog)
    assert "inference mode" in line
    with torch.inference_mode():
        assert_exact(model)
