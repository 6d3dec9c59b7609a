"""Targets of which some layers keep one state of the text: chains, and nothing else, say what generate() says."""

import logging
import sys
import threading

import pytest
import torch
from transformers import PreTrainedModel

from vispec import SpecModel
from vispec.evaluation.families.family import tiny_model
from vispec.evaluation.families.oracle import Oracle
from vispec.evaluation.families.prompts import batch_of, prompt_of
from vispec.evaluation.families.registry import FAMILIES
from vispec.evaluation.families.trial import random_head
from vispec.model import decoding
from vispec.model.drafts import PromptLookup
from vispec.model.recurrent import LINEAR, MODULES, RULE, StateCache
from vispec.model.shape import TreeShape
from vispec.model.target import Target

NAMES = ("qwen3_5", "qwen3_5_moe", "lfm2_vl")
NEW = 40


def model_of(name: str) -> PreTrainedModel:
    model = tiny_model(FAMILIES[name])
    if model is None:
        pytest.skip(f"this transformers has no {name}")
    return model


@torch.inference_mode()
def own(model: PreTrainedModel, prompt: dict, **options) -> torch.Tensor:
    return model.generate(**prompt, **{"do_sample": False, "max_new_tokens": NEW} | options)


def oracle(model: PreTrainedModel, answers: torch.Tensor) -> Oracle:
    return Oracle(list(answers), model.get_input_embeddings().weight.shape[0])


@pytest.mark.parametrize("chain", ["2/0/1", "4/2/1", "9/7/1"])
@pytest.mark.parametrize("name", NAMES)
def test_chains_say_what_generate_says(name, chain):
    model = model_of(name)
    prompt = prompt_of(FAMILIES[name], model, ".a.b.", 0)
    expected = own(model, prompt)
    spec = SpecModel(model, oracle(model, expected), tree=chain)
    answer, accepted = spec.specgenerate(**prompt, max_new_tokens=NEW, return_acceptance_len=True)
    assert answer.tolist() == expected.tolist()
    assert len(set(accepted)) > 1, "chains are accepted in part"
    assert spec.baseline_generate(**prompt, max_new_tokens=NEW).tolist() == expected.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_rows_go_their_own_ways_and_leave_when_they_end(name):
    model = model_of(name)
    prompts = [prompt_of(FAMILIES[name], model, layout, seed) for seed, layout in enumerate((".a.b.", "...", ".b.."))]
    alone = [own(model, prompt)[0] for prompt in prompts]
    # the first row ends first, so that another one takes its place
    end = int(alone[0][-NEW + 5])
    texts = [own(model, prompt, eos_token_id=end, pad_token_id=0)[0].tolist() for prompt in prompts]
    spec = SpecModel(model, oracle(model, alone), tree="5/3/1")
    batch = batch_of(prompts, FAMILIES[name].join)
    answers = spec.generate(**batch, do_sample=False, max_new_tokens=NEW, eos_token_id=end, pad_token_id=0)
    width = batch["input_ids"].shape[1]
    for answer, text, prompt in zip(answers.tolist(), texts, prompts, strict=True):
        new = text[prompt["input_ids"].shape[1] :]
        assert answer[width:] == new + [0] * (len(answer) - width - len(new))
    assert len(texts[0]) < len(alone[0])


@pytest.mark.parametrize("name", NAMES)
def test_heads_and_answers_longer_than_their_first_slots(name, monkeypatch):
    monkeypatch.setattr(decoding, "CAPACITY_AHEAD", 8)
    model = model_of(name)
    prompt = prompt_of(FAMILIES[name], model, ".a.", 1)
    expected = own(model, prompt)
    for draft in (random_head(model, "vispec"), oracle(model, expected)):
        answer = SpecModel(model, draft, tree="6/4/1").specgenerate(**prompt, max_new_tokens=NEW)
        assert answer.tolist() == expected.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_says_the_same_with_chains_and_without(name):
    model = model_of(name)
    prompt = prompt_of(FAMILIES[name], model, ".a.", 2)
    options = {"do_sample": True, "temperature": 0.7, "max_new_tokens": NEW, "seed": 5}
    plain = SpecModel(model, PromptLookup(), tree="5/3/1").generate(**prompt, **options, speculate=False)
    for chain in ("3/1/1", "6/4/1"):
        assert (
            SpecModel(model, oracle(model, plain), tree=chain).generate(**prompt, **options).tolist() == plain.tolist()
        )
    assert plain.tolist() != own(model, prompt).tolist()


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_trees_with_branches_are_refused_or_cut(name, caplog):
    model = model_of(name)
    with pytest.raises(ValueError, match=r"cannot follow the branches of the tree 12/3/4: give a chain, such as 5/3/1"):
        SpecModel(model, PromptLookup(), tree="12/3/4")
    spec = SpecModel(model)  # without a draft there is no tree
    with pytest.raises(ValueError, match="the tree 6/2/2: give a chain, such as 4/2/1, or auto"):
        spec.with_tree("6/2/2", PromptLookup())
    with caplog.at_level(logging.WARNING, "vispec"):
        assert SpecModel(model, PromptLookup()).shape == TreeShape(5, 3, 1)
    assert "follows chains alone: the tree is 5/3/1, not 30/3/8" in caplog.text


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_auto_and_tune_choose_among_chains(name, caplog):
    model = model_of(name)
    prompt = prompt_of(FAMILIES[name], model, ".a.", 3)
    expected = own(model, prompt)
    caplog.set_level(logging.INFO, "vispec")
    spec = SpecModel(model, oracle(model, expected), tree="auto")
    assert "follows chains alone" not in caplog.text, "nobody asked for the default tree"
    for _ in range(2):
        assert spec.specgenerate(**prompt, max_new_tokens=NEW).tolist() == expected.tolist()
    (auto,) = spec._auto.values()
    assert len(auto.shapes) > 1 and {shape.top_k for shape in auto.shapes} == {1}
    spec = SpecModel(model, PromptLookup(), tree="tune")
    tuning = spec.tune([prompt], max_new_tokens=8)
    assert len(tuning.measured) > 3 and {shape.top_k for shape in tuning.measured} == {1}
    assert spec.specgenerate(**prompt, max_new_tokens=NEW).tolist() == expected.tolist()


def test_the_state_after_a_part_of_a_pass_is_that_of_its_tokens_one_by_one():
    target = Target(model_of("qwen3_5"))
    net = getattr(target.decoder.layers[0], MODULES[LINEAR])
    hidden = torch.randn(3, 9, target.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([1, 4, 2])

    def read(cache: StateCache, start: int, stop: int, counts: torch.Tensor, row: slice = slice(None)):
        cache.reserve(stop - start)
        with target._recurrent.watch(cache):
            out = net(hidden[row, start:stop], cache_params=cache)
        cache.commit(counts)
        return out

    with torch.inference_mode():
        chains = target.new_cache(3, 32)
        read(chains, 0, 5, torch.full((3,), 5))
        read(chains, 5, 9, counts)
        for row, count in enumerate(counts.tolist()):
            steps, part = target.new_cache(1, 32), chains.part(row, row + 1)
            read(steps, 0, 5, torch.tensor([5]), slice(row, row + 1))
            for place in range(5, 5 + count):
                read(steps, place, place + 1, torch.tensor([1]), slice(row, row + 1))
            torch.testing.assert_close(part.get_recurrent_state(0), steps.get_recurrent_state(0))
            torch.testing.assert_close(part.get_conv_state(0), steps.get_conv_state(0))
            assert part.get_recurrent_state(0).norm() > 0


def test_keys_have_slots_in_the_other_layers_alone():
    target = Target(model_of("qwen3_5"))
    cache = target.new_cache(2, 16)
    ids = torch.randint(3, 40, (1, 6), generator=torch.Generator().manual_seed(0))
    target.prefill(cache.part(0, 1), ids, {})
    (buffer,) = cache._buffers.values()
    assert buffer.shape[0] == 1 < len(target.decoder.layers)


def test_a_net_that_leads_its_state_otherwise_is_refused(monkeypatch):
    model = model_of("qwen3_5")
    net = getattr(Target(model).decoder.layers[0], MODULES[LINEAR])
    beside = sys.modules[type(net).__module__]
    rule = getattr(beside, RULE)
    monkeypatch.setattr(beside, RULE, lambda *args, beta, **more: rule(*args, beta=beta * 0.9, **more))
    with pytest.raises(ValueError, match="^Qwen3_5GatedDeltaNet leads its state otherwise than the gated delta nets"):
        SpecModel(model)


def test_nets_that_are_built_otherwise_are_refused():
    model = model_of("qwen3_5")
    net = getattr(Target(model).decoder.layers[1], MODULES[LINEAR])
    net.in_proj_c = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="^Qwen3_5ForConditionalGeneration has linear-attention layers, which keep"):
        SpecModel(model)


def test_the_model_answers_others_meanwhile_and_stays_as_it_was():
    model = model_of("qwen3_5")
    family = FAMILIES["qwen3_5"]
    prompts = [prompt_of(family, model, ".a.", seed) for seed in range(3)]
    expected = [own(model, prompt).tolist() for prompt in prompts]
    spec = SpecModel(model, oracle(model, torch.tensor(expected[0])), tree="5/3/1")
    found = {}

    def answer(number: int) -> None:
        for _ in range(3):
            if number:  # plainly by transformers' own loop, which has a cache of its own
                found[number] = own(model, prompts[number]).tolist()
            else:
                found[number] = spec.specgenerate(**prompts[number], max_new_tokens=NEW).tolist()

    threads = [threading.Thread(target=answer, args=(number,)) for number in (0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(3)] == expected
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
