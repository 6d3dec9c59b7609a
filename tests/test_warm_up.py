"""Nothing that is timed waits for a capture: whoever measures gets ready for all sizes that come."""

from pathlib import Path

import pytest
from conftest import CAPTURED_BUCKET
from script_files import script
from test_batches import model_of
from tiny_models import random_target, text_prompt

from vispec.evaluation import answerer, measure
from vispec.evaluation.benchmarks import Question
from vispec.evaluation.loading import Models
from vispec.evaluation.measure import Arm, Generation, interleave
from vispec.model import tune
from vispec.model.shape import TreeShape
from vispec.prompts import user_turn

FAMILY = Path(__file__).parent / "golden" / "llava_next"


@pytest.fixture
def model():
    return model_of(random_target("llava_1.5", 0, vocabulary=12), "eagle2")


def prompts(model) -> list[dict]:
    """Of several lengths, the first one neither the shortest nor the longest."""
    return [text_prompt(model.target.model, length, 0) for length in (20, 5, 40)]


def cleared_by(monkeypatch, module, eager: set) -> None:
    """Forget what ran before the arms began to take turns."""
    begin = module.turns

    def turns(*args, **options):
        if not began:
            eager.clear()
        began.append(True)
        return begin(*args, **options)

    began: list[bool] = []
    monkeypatch.setattr(module, "turns", turns)


@pytest.mark.parametrize(("method", "tree"), [("eagle2", None), ("medusa", None), ("lookup", None), ("lookup", "auto")])
def test_arms_that_take_turns(captures, eager, monkeypatch, method, tree):
    model = model_of(random_target("llava_1.5", 0, vocabulary=12), method)
    if tree is not None:
        model.set_tree(tree)
    cleared_by(monkeypatch, measure, eager)
    arms = [Arm("baseline", model, "baseline"), Arm("spec", model, "spec")]
    found = interleave(arms, prompts(model), Generation(0.0, CAPTURED_BUCKET + 4), repetitions=1)
    assert any(len(answer.output_ids) > CAPTURED_BUCKET for (answer,) in found["spec"])
    assert eager == set() and captures


def test_batches(captures, eager, model, monkeypatch):
    """Rows leave a batch one after the other, and those that are left have steps of their own."""
    bench = script("bench_batches")
    cleared_by(monkeypatch, bench, eager)
    bench.measure(model, prompts(model), [3, 1], 1, 12, 0.0)
    assert eager == set()
    assert any(key[:2] == ("verify", 2) for key in captures), "all answers end together"


def test_trees_that_are_measured(captures, eager, model, monkeypatch):
    """Rules are got ready once the best of the other trees is known, so between answers that are timed."""
    missed: set = set()
    ready: list = []
    get_ready = tune._arm

    def watched(*args):
        if ready:
            missed.update(eager)
        ready.append(get_ready(*args))
        eager.clear()
        return ready[-1]

    monkeypatch.setattr(tune, "_arm", watched)
    monkeypatch.setattr(tune, "SHAPES", (TreeShape(2, 0, 1), TreeShape(8, 3, 4)))
    monkeypatch.setattr(tune, "REPETITIONS", 1)
    tune.tune(model, prompts(model), max_new_tokens=CAPTURED_BUCKET)
    assert missed | eager == set() and captures and len(ready) > 3


def test_questions_of_a_benchmark(captures, eager, monkeypatch):
    """Questions are read as they come, so what a longer or a shorter one needs is got ready before it is timed."""
    monkeypatch.setattr(answerer, "WARM_UPS", 1)
    missed: set = set()
    get_ready = answerer.Answerer._get_ready

    def watched(*args):
        missed.update(eager)
        get_ready(*args)
        eager.clear()

    monkeypatch.setattr(answerer.Answerer, "_get_ready", watched)
    draft = str(FAMILY / "draft_vispec")
    loaded = answerer.Answerer(Models(str(FAMILY / "target"), {"vispec": draft}, tree=TreeShape(8, 2, 4)))
    generation = Generation(0.0, CAPTURED_BUCKET)
    for number, words in enumerate((20, 1, 40)):
        question = Question(number, (user_turn("what " * words),))
        outcome = loaded.answer(answerer.Ask(question, "gqa", generation, 1, ("baseline", "vispec")))
        assert not isinstance(outcome, answerer.LeftOut), outcome
    assert missed | eager == set() and captures
