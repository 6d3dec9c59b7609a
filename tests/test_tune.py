"""Choosing a tree: the fastest one wins, the default stays where nothing is faster, answers stay the target's own."""

import itertools
import logging

import pytest
import torch
from tiny_models import GOLDEN, generate, recorded_case, recorded_model

from vispec import SpecModel
from vispec.model import tune
from vispec.model.adaptive import AdaptiveTree
from vispec.model.drafts import BaseHead, MedusaHead, PromptLookup
from vispec.model.shape import TreeShape

FAMILY = GOLDEN / "llava_next"
TARGET, DRAFT = str(FAMILY / "target"), str(FAMILY / "draft_vispec")


@pytest.fixture
def small(monkeypatch):
    """So many trees and repetitions that a test can wait for them."""
    monkeypatch.setattr(tune, "SHAPES", tuple(map(TreeShape.parse, ("2/0/1", "6/2/2", "8/1/4", "12/3/4"))))
    monkeypatch.setattr(tune, "REPETITIONS", 1)


def pair(draft: BaseHead | PromptLookup | None = None) -> SpecModel:
    recorded = recorded_model("llava_next", "vispec")
    return SpecModel(recorded.target, recorded.draft if draft is None else draft)


def prompts() -> list[dict]:
    """One without and one with an image."""
    return [recorded_case("llava_next", "vispec", case).inputs for case in (1, 0)]


def with_speeds(monkeypatch, speeds: dict[str, float]) -> list[TreeShape]:
    """Answers take as long as a tree's speed says, whatever the machine does; returns who answered, in order."""
    asked: list[TreeShape] = []

    def answer(generate, inputs, max_new_tokens):
        model = generate.__self__
        if generate.__name__ == "baseline_generate":
            return 2, [], 1.0
        if max_new_tokens != tune.WARM_UP_TOKENS:
            asked.append(model.shape)
        return 11, [1] * 5, 10 / speeds.get(str(model.shape), 1.0)

    monkeypatch.setattr(tune, "_answer", answer)
    return asked


@pytest.mark.parametrize("fastest", ["6/2/2", "30/7/4", "2/0/1"])
def test_the_fastest_tree_is_chosen(monkeypatch, fastest):
    asked = with_speeds(monkeypatch, {fastest: 3.0, "16/7/2": 2.5})
    found = tune.tune(pair(), prompts())
    assert str(found.shape) == fastest and found.measured[found.shape].speed == pytest.approx(3.0)
    answers = {shape: asked.count(shape) for shape in found.measured}
    assert answers[found.shape] == max(answers.values()) > min(answers.values()), "slow trees drop out"
    assert f"chosen: {fastest}, 3.00 times as fast as 30/3/8 in this run" in found.report()


def test_the_default_stays_where_nothing_is_faster(monkeypatch):
    asked = with_speeds(monkeypatch, {"30/3/8": 3.0})
    found = tune.tune(pair(), prompts())
    assert found.shape == found.default == TreeShape(30, 3, 8)
    assert "chosen: 30/3/8, 1.00 times" in found.report()
    rounds = [list(group) for _, group in itertools.groupby(asked[: 4 * len(tune.SHAPES)], key=lambda shape: shape)]
    assert len(rounds) > len(tune.SHAPES), "trees take turns prompt by prompt"


@pytest.mark.parametrize(
    ("fastest", "measured", "chosen"),
    [("16/7/2", 4, "talon:mu=0.03,n=16,d=7,k=2"), ("12/3/4", 3, "sage:n=12,d=3,k=4"), ("2/0/1", 0, "2/0/1")],
)
def test_rules_are_measured_at_the_size_of_the_best_tree(monkeypatch, fastest, measured, chosen):
    """All that can decide anything there, once, and the fastest of them against the last trees."""
    asked = with_speeds(monkeypatch, {fastest: 3.0, chosen: 3.5})
    found = tune.tune(pair(), prompts())
    rules = [shape for shape in found.measured if isinstance(shape, AdaptiveTree)]
    assert {(rule.total_token, rule.depth, rule.top_k) for rule in rules} <= {tuple(map(int, fastest.split("/")))}
    assert len(rules) == measured and str(found.shape) == chosen
    last = [2 + 2 * tune.REPETITIONS] if rules else []
    assert sorted(asked.count(rule) for rule in rules) == [2] * (measured - 1) + last


def test_one_outlier_decides_nothing(monkeypatch):
    with_speeds(monkeypatch, {"6/2/2": 2.0})
    answer, calls = tune._answer, itertools.count()

    def disturbed(generate, inputs, max_new_tokens):
        new, accepted, seconds = answer(generate, inputs, max_new_tokens)
        late = str(generate.__self__.shape) == "6/2/2" and next(calls) == 7
        return new, accepted, seconds * (100 if late else 1)

    monkeypatch.setattr(tune, "_answer", disturbed)
    assert str(tune.tune(pair(), prompts()).shape) == "6/2/2"


def test_a_tuned_model_stays_lossless(small, capsys, caplog):
    caplog.set_level(logging.INFO, logger="vispec")
    model = SpecModel.from_pretrained(TARGET, DRAFT)
    tuning = model.tune(prompts(), max_new_tokens=16)
    assert model.shape == tuning.shape and model.tree is None
    assert tuning.report() in caplog.messages and capsys.readouterr().out == ""
    for found in tuning.measured.values():
        assert 0 < found.tokens <= sum(found.accepted) + len(found.accepted)
    inputs = prompts()[1]
    answer = model.specgenerate(**inputs, max_new_tokens=32)
    assert torch.equal(answer, generate(model.target.model, inputs, max_new_tokens=32))


def test_prompt_lookup_and_medusa(small):
    recorded = recorded_model("llava_next", "vispec")
    medusa = MedusaHead(recorded.draft.config)
    medusa.embed_tokens.weight = recorded.target.embed_tokens.weight
    for draft in (PromptLookup(), medusa.eval()):
        model = pair(draft)
        assert model.tune(prompts(), max_new_tokens=12).shape == model.shape == draft.fit(model.shape)


def test_nothing_to_measure(small):
    model = pair()
    with pytest.raises(ValueError, match="no tree can be chosen: there are no prompts"):
        model.tune([])
    with pytest.raises(ValueError, match="end with their first token"):
        tune.tune(_ends_at_once(model), prompts())
    with pytest.raises(ValueError, match="without a draft head"):
        SpecModel(model.target).tune(prompts())


def _ends_at_once(model: SpecModel) -> SpecModel:
    class Short(SpecModel):
        def baseline_generate(self, **inputs):
            return super().baseline_generate(**{**inputs, "max_new_tokens": 1})

    return Short(model.target, model.draft)
