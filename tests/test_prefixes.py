"""Prompts that are read on from what they share with earlier ones are answered as if they were read whole."""

import pytest
import torch
from tiny_families import WINDOWS, family_model, llava_over
from tiny_models import generate, image_prompt, random_pair, random_target

from vispec import SpecModel
from vispec.evaluation.families.prompts import prompt_of
from vispec.evaluation.families.registry import FAMILIES
from vispec.model import reading
from vispec.model.drafts import PromptLookup
from vispec.model.prefixes import PrefixCache
from vispec.model.prompt import Prompt

NEW = 12


def turns(prompt: dict, count: int = 3) -> list[dict]:
    """Conversations about one picture: each has more text behind the same beginning, and an end of its own."""
    found = []
    for turn in range(count):
        more = 5 + (torch.arange(3 * turn + 2) * (turn + 3)) % 20
        one = dict(prompt)
        for name, value in prompt.items():
            if value.shape == prompt["input_ids"].shape:
                last = more if name == "input_ids" else torch.full_like(more, name == "attention_mask")
                one[name] = torch.cat([value, last[None]], dim=1)
        found.append(one)
    return found


@pytest.fixture
def found(monkeypatch) -> list[int]:
    """Tokens that each prompt shares with a kept one and does not read again."""
    told, read_on = [], reading._read_on
    monkeypatch.setattr(reading, "_read_on", lambda *given: told.append(given[-1]) or read_on(*given))
    return told


def answers(model: SpecModel, prompts: list[dict]) -> list[list[int]]:
    arms = model.specgenerate, model.baseline_generate
    return [arm(**prompt, max_new_tokens=NEW)[0].tolist() for prompt in prompts for arm in arms]


def same_with_and_without(model: SpecModel, prompts: list[dict]) -> None:
    expected = answers(model, prompts)
    model.target.prefixes = PrefixCache(100_000)
    assert answers(model, prompts) == expected


@pytest.mark.parametrize("method", ["vispec", "eagle2", "eagle3", "msd", "medusa"])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_every_draft_and_its_rounds(family, method, found):
    model = random_pair(family, 3, method)
    prompts = turns(image_prompt(model.target.model, 2, "a.b"))
    expected = []
    for prompt in prompts:
        expected += [generate(model.target.model, prompt, max_new_tokens=NEW)[0].tolist()] * 2
    tau = [model.specgenerate(**prompt, max_new_tokens=NEW, log=True)[1:] for prompt in prompts]
    model.target.prefixes = PrefixCache(100_000)
    assert answers(model, prompts) == expected
    assert len(found) == len(expected) - 1, "all but the first are read on"
    assert [model.specgenerate(**prompt, max_new_tokens=NEW, log=True)[1:] for prompt in prompts] == tau


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family(name, found):
    family = FAMILIES[name]
    try:
        model = SpecModel(family_model(family), PromptLookup(), 12, 3, 4)
    except ValueError:
        pytest.skip("refused as a target")
    layout = "a.b" if family.images else "..."
    same_with_and_without(model, turns(prompt_of(family, model.target.model, layout, 1)))
    # PaliGemma's prompts see all of themselves, so that keys depend on what follows them
    assert bool(found) != (name.startswith("paligemma") or model.target.recurrent)


@pytest.mark.parametrize("kind", WINDOWS)
def test_windows(kind, found):
    family = llava_over(kind)
    model = SpecModel(family_model(family), PromptLookup(), 12, 3, 4)
    same_with_and_without(model, turns(prompt_of(family, model.target.model, "a....", 1)))
    assert found


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_in_half_precision_features_differ_by_rounding_alone(family):
    model = random_pair(family, 3)
    for part in (model.target.model, model.draft):
        part.to(torch.bfloat16)
    target, prompts = model.target, turns(image_prompt(model.target.model, 2, "a.b."))

    def read(inputs: dict) -> Prompt:
        ids = inputs["input_ids"]
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        return reading.read_prompt(target, target.new_cache(1, ids.shape[1]), ids, rest)

    whole = list(map(read, prompts))
    target.prefixes = PrefixCache(100_000)
    for inputs, expected in zip(prompts, whole, strict=True):
        found = read(inputs)
        error = (found.hidden - expected.hidden).norm() / expected.hidden.norm()
        assert error < 0.05 and torch.equal(found.embeds, expected.embeds)
        assert bool(found.reused) == (inputs is not prompts[0])
        answer = model.specgenerate(**inputs, max_new_tokens=NEW)
        assert answer.shape[1] == inputs["input_ids"].shape[1] + NEW


def test_what_keeps_prompts_from_being_read_on_is_said_once(found, caplog):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    target = random_target("llava_1.5", 0, rope_scaling=rope, rope_parameters=rope)
    model = SpecModel(target, PromptLookup(), 12, 3, 4)
    same_with_and_without(model, turns(image_prompt(target, 2, "a.b")))
    assert not found
    assert caplog.text.count("prompts with images are read whole: the angles of dynamic rotary embeddings") == 1


def test_another_picture_under_the_same_ids_is_read(found):
    model = random_pair("llava_next", 3)
    prompts = turns(image_prompt(model.target.model, 2, "a.b"))
    model.target.prefixes = PrefixCache(100_000)
    answers(model, prompts)
    found.clear()
    other = prompts[-1] | {"pixel_values": prompts[-1]["pixel_values"].flip(-1)}
    expected = generate(model.target.model, other, max_new_tokens=NEW)[0].tolist()
    assert model.specgenerate(**other, max_new_tokens=NEW)[0].tolist() == expected
    assert not found


def test_the_least_recently_used_goes_first():
    model = random_pair("llava_next", 3)
    first, second, third = (image_prompt(model.target.model, seed, "a.b.") for seed in (1, 2, 3))
    length = first["input_ids"].shape[1]
    prefixes = model.target.prefixes = PrefixCache(int(2.5 * max(length, second["input_ids"].shape[1])))
    for prompt in (first, second, first, third):
        model.specgenerate(**prompt, max_new_tokens=2)
    kept = [one.ids.tolist() for one in prefixes._kept]
    assert kept == [first["input_ids"][0].tolist(), third["input_ids"][0].tolist()]
