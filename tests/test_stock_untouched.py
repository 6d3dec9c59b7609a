"""A target is shared with its owner: nothing of transformers, and nothing that others see of the model, is changed."""

import copy
import sys
import types

import pytest
import torch
from lean_targets import assert_exact, build, decoder_of, llava, spec
from tiny_models import generate, text_prompt
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FAMILIES = ("llava_1.5-llama", "llava_next", "qwen2_5_vl", "qwen3_vl")


def of_transformers() -> dict[str, object]:
    """Functions, classes and their attributes of all modelling files that are loaded, by name."""
    found = {f"attention {name}": ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS}
    for file, module in list(sys.modules.items()):
        if not file.startswith(("transformers.models.", "transformers.integrations.", "transformers.activations")):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType):
                found[f"{file}.{name}"] = value
            elif isinstance(value, type) and value.__module__ == file and issubclass(value, torch.nn.Module):
                attributes = {key: of for key, of in vars(value).items() if not key.startswith("__abc")}
                found |= {f"{file}.{name}.{key}": of for key, of in attributes.items()}
    for name in ("linear", "rms_norm", "scaled_dot_product_attention", "silu"):
        found[f"torch {name}"] = getattr(torch.nn.functional, name)
    for kind in (torch.nn.Linear, torch.nn.Embedding, torch.nn.Module):
        found |= {f"{kind.__name__}.{key}": value for key, value in vars(kind).items()}
    return found


def of_modules(model) -> list[tuple]:
    """What each module is: its class, its own attributes, its hooks."""
    return [
        (name, type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_wrapping_and_decoding_leave_everything_as_it_is(name):
    vlm = build(name)
    generate(vlm, text_prompt(vlm, 9, seed=4), max_new_tokens=2)  # loads what transformers loads when it is asked
    kinds, modules = of_transformers(), of_modules(vlm)
    configs = copy.deepcopy([vlm.config.to_dict(), vlm.generation_config.to_dict()])
    attention = decoder_of(vlm).layers[0].self_attn.config._attn_implementation
    model = spec(vlm)
    assert model.target.lean
    assert_exact(model)
    assert of_modules(vlm) == modules
    assert [vlm.config.to_dict(), vlm.generation_config.to_dict()] == configs
    assert decoder_of(vlm).layers[0].self_attn.config._attn_implementation == attention == "sdpa"
    after = of_transformers()
    assert all(after[key] is value for key, value in kinds.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_others_get_the_same_numbers_bit_for_bit(name):
    vlm, other = build(name), build(name)
    ids = torch.arange(5, 17)[None]
    before = vlm(input_ids=ids, output_hidden_states=True)
    assert_exact(spec(vlm))
    for model in (vlm, other):
        after = model(input_ids=ids, output_hidden_states=True)
        assert torch.equal(after.logits, before.logits)
        for ours, theirs in zip(after.hidden_states, before.hidden_states, strict=True):
            assert torch.equal(ours, theirs)


def test_others_still_get_attention_weights():
    vlm = llava(attention="eager")
    ids = torch.arange(5, 17)[None]
    before = vlm(input_ids=ids, output_attentions=True).attentions
    assert_exact(spec(vlm))
    after = vlm(input_ids=ids, output_attentions=True).attentions
    assert len(before) == len(after) == 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, before, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_its_own_generate_says_what_it_said(name):
    vlm = build(name)
    prompt = text_prompt(vlm, 9, seed=4)
    before = generate(vlm, prompt, max_new_tokens=12)
    model = spec(vlm)
    model.specgenerate(**text_prompt(vlm, 14, seed=5), max_new_tokens=12)
    assert torch.equal(generate(vlm, prompt, max_new_tokens=12), before)


def test_an_unwrapped_model_of_the_same_class_is_no_target():
    vlm, other = llava(), llava(seed=1)
    places = {name: parameter.data_ptr() for name, parameter in other.named_parameters()}
    prompt = text_prompt(other, 9, seed=4)
    before = generate(other, prompt, max_new_tokens=12)
    assert_exact(spec(vlm))
    assert torch.equal(generate(other, prompt, max_new_tokens=12), before)
    assert {name: parameter.data_ptr() for name, parameter in other.named_parameters()} == places
