"""ViSkip: how much the last layer looks at images, and answers where drafts are skipped by it."""

import pytest
import torch
from lean_targets import llava
from tiny_models import generate, image_prompt, random_head, random_target, reference_inputs, text_prompt

from vispec import SpecModel
from vispec.evaluation.comparison import tau
from vispec.evaluation.measure import Generation, answer_question
from vispec.model import gaze
from vispec.model.drafts import PromptLookup

NEW = 16


@pytest.fixture
def masses(monkeypatch) -> list[tuple[list[int], list[float]]]:
    """Lengths of the rows, and r of each, every time that it is asked for."""
    seen = []
    mass = gaze.image_mass

    def watched(target, cache, *args):
        found = mass(target, cache, *args)
        seen.append((cache.lengths.tolist(), found[:, 0].tolist()))
        return found

    monkeypatch.setattr(gaze, "image_mass", watched)
    return seen


TARGETS = {
    "llava_next": lambda **options: random_target("llava_next", 3, **options),
    "m-rope": lambda **options: random_target("qwen2_vl", 3, **options),
    "m-rope, grouped": lambda **options: random_target("qwen2_5_vl", 3, **options),
    "norms of q and k": lambda **options: llava("qwen3", 3, **options),
}


@pytest.mark.parametrize("method", ["vispec", "eagle3"])
@pytest.mark.parametrize("name", TARGETS)
def test_r_is_what_eager_attention_weights_say(name, method, masses):
    target = TARGETS[name]()
    model = SpecModel(target, random_head(target, method, 5), tree="8/2/3", skip_visual=0.3)
    image_token = getattr(target.config, "image_token_id", getattr(target.config, "image_token_index", None))
    for seed in range(20):
        masses.clear()
        inputs = image_prompt(target, seed, ".a.")
        answer = model.specgenerate(**inputs, max_new_tokens=NEW)
        new = answer[:, inputs["input_ids"].shape[1] :].tolist()[0]
        if not {image_token, getattr(target.config, "video_token_id", None)} & {*new}:
            break  # the whole text can be read once more
    eager = TARGETS[name](attention="eager")
    whole = reference_inputs(target, {**inputs, "input_ids": answer, "attention_mask": torch.ones_like(answer)})
    with torch.inference_mode():
        last = eager(**whole, output_attentions=True).attentions[-1][0]
    expected = (last * (answer[0] == image_token)).sum(-1).mean(0)
    assert len(masses) > 3
    for (length,), (r,) in masses:
        if length <= answer.shape[1]:  # the last round may go beyond the answer
            assert r == pytest.approx(expected[length - 1].item(), abs=1e-5) and 0 < r < 1


@pytest.mark.parametrize("method", ["vispec", "eagle2", "eagle3", "medusa", "lookup"])
@pytest.mark.parametrize("captured", [False, True])
def test_answers_are_the_targets_whatever_is_skipped(method, captured, masses, request):
    if captured:
        request.getfixturevalue("captures")
    target = random_target("qwen2_vl", 4, vocabulary=16)
    draft = PromptLookup() if method == "lookup" else random_head(target, method, 6)
    inputs = image_prompt(target, 2, ".a.b.")
    expected = generate(target, inputs, max_new_tokens=NEW).tolist()

    def lengths(threshold: float | None, tree: str = "8/2/3") -> list[int]:
        model = SpecModel(target, draft, tree=tree, skip_visual=threshold)
        answer, found = model.specgenerate(**inputs, max_new_tokens=NEW, return_acceptance_len=True)
        assert answer.tolist() == expected
        return found

    always = lengths(None)
    assert lengths(1.1) == always and lengths(0) == []
    found = sorted(r for _, (r,) in masses)
    some = lengths(found[len(found) // 2])
    assert 0 < len(some) < NEW - 1
    assert lengths(0.05) is not None
    lengths(found[len(found) // 2], "auto")


def test_a_plain_step_waits_for_all_rows_of_a_batch(masses):
    """A row without an image never looks."""
    target = random_target("llava_next", 4, vocabulary=16)
    draft = random_head(target, "eagle2", 6)
    prompts = [image_prompt(target, 2, ".a."), text_prompt(target, 12, 2)]
    for threshold, skipped in ((0.0, True), (1e-9, False)):
        gated = SpecModel(target, draft, tree="8/2/3", skip_visual=threshold)
        length = max(prompt["input_ids"].shape[1] for prompt in prompts)
        pads = [length - prompt["input_ids"].shape[1] for prompt in prompts]
        padded = {
            name: torch.cat(
                [torch.nn.functional.pad(prompt[name], (pad, 0)) for prompt, pad in zip(prompts, pads, strict=True)]
            )
            for name in ("input_ids", "attention_mask")
        }
        padded |= {name: value for name, value in prompts[0].items() if name not in padded}
        answers, found = gated.specgenerate(**padded, max_new_tokens=NEW, return_acceptance_len=True)
        for row, prompt in enumerate(prompts):
            expected = generate(target, prompt, max_new_tokens=NEW)[0, prompt["input_ids"].shape[1] :]
            assert answers[row, length:].tolist() == expected.tolist()
        assert (found == [[], []]) == skipped
    assert {found[1] for _, found in masses if len(found) == 2} == {0.0}


def test_no_round_has_no_tau():
    target = random_target("llava_next", 4)
    model = SpecModel(target, random_head(target, "eagle2", 6), tree="8/2/3", skip_visual=0)
    inputs = image_prompt(target, 2, ".a.")
    answer = answer_question(model, inputs, "spec", Generation(0.0, 6))
    assert (answer.plain_steps, answer.acceptance_lengths, tau([answer])) == (5, [], None)
    found = model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert found.tau is None and found.rounds == 5
    # trees are measured by rounds with a draft
    assert model.tune([inputs], max_new_tokens=4).shape == model.shape and model.skip_visual == 0


def test_what_cannot_be_asked_for():
    target = random_target("llava_next", 4)
    head = random_head(target, "eagle2", 6)
    with pytest.raises(ValueError, match="skip_visual takes its queries from the lean pass"):
        SpecModel(target, head, fast=False, skip_visual=0.3)
    with pytest.raises(TypeError, match="skip_visual must be a number, found '0.3'"):
        SpecModel(target, head, skip_visual="0.3")
