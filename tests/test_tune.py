"""Choosing a tree: replayed decoding is real decoding, curves decide, and answers stay the target's own."""


import pytest
import torch
from tiny_models import GOLDEN, generate, recorded_case, recorded_model

from vispec import SpecModel
from vispec.model import tune
from vispec.model.draft import BaseHead
from vispec.model.draft_vocab import DraftVocabulary
from vispec.model.lookup import PromptLookup
from vispec.model.medusa import MedusaHead
from vispec.model.tree import TreeShape
from vispec.model.tune import Prediction, RoundTime, Transcript, choose, non_decreasing, record

FAMILY = GOLDEN / "llava_next"
TARGET, DRAFT = str(FAMILY / "target"), str(FAMILY / "draft_vispec")


@pytest.fixture
def small(monkeypatch):
    """A grid and a number of repetitions that a test can wait for."""
    monkeypatch.setattr(tune, "SIZES", (2, 8, 30))
    monkeypatch.setattr(tune, "WIDTHS", (1, 4))
    monkeypatch.setattr(tune, "DEEPEST", 3)
    monkeypatch.setattr(tune, "TIMED_ROUNDS", 2)
    monkeypatch.setattr(tune, "REPETITIONS", 1)


def pair(draft: BaseHead | PromptLookup | None = None, tree=(30, 3, 8)) -> SpecModel:
    recorded = recorded_model("llava_next", "vispec")
    return SpecModel(recorded.target.model, recorded.draft if draft is None else draft, *tree)


def prompts() -> list[dict]:
    """One without and one with an image."""
    return [recorded_case("llava_next", "vispec", case).inputs for case in (1, 0)]


# --- acceptance ---


def check_replay(model: SpecModel, shapes: list[TreeShape], tokens: int = 24) -> None:
    """What a transcript says of a shape is what decoding with it does."""
    deepest = sorted({model.draft.fit(TreeShape(2, 5, shape.top_k)) for shape in shapes}, key=lambda s: s.top_k)
    accepted = 0
    for inputs in prompts():
        transcript = record(model, inputs, deepest, tokens)
        for shape in shapes:
            arm = SpecModel(model.target.model, model.draft, shape.total_token, shape.depth, shape.top_k)
            answer, lengths = arm.specgenerate(**inputs, max_new_tokens=tokens, return_acceptance_len=True)
            assert transcript.tokens == answer.shape[1] - inputs["input_ids"].shape[1]
            assert transcript.rounds(arm.shape) == len(lengths), shape
            accepted += sum(lengths)
    assert accepted > 0, "nothing was accepted, so nothing was tested"


SHAPES = [TreeShape(2, 0, 1), TreeShape(6, 4, 1), TreeShape(8, 1, 4), TreeShape(12, 3, 4), TreeShape(60, 5, 8)]


def test_replay_is_decoding():
    check_replay(pair(), SHAPES)


def test_replay_with_a_draft_vocabulary():
    model = pair()
    head = BaseHead.from_pretrained(DRAFT)
    head.draft_vocab = DraftVocabulary(torch.arange(0, 38, 2), 38, "")
    check_replay(pair(head), SHAPES)
    assert model.draft.draft_vocab is None


def test_replay_of_prompt_lookup():
    check_replay(pair(PromptLookup()), SHAPES[1:4])


def test_replay_of_medusa():
    head = recorded_model("llava_next", "vispec").draft
    medusa = MedusaHead(head.config).eval()
    medusa.embed_tokens.weight.data = head.embed_tokens.weight.detach()
    check_replay(pair(medusa), [TreeShape(12, 4, 4), TreeShape(30, 4, 8)])


def test_ranks_count_every_token():
    model = pair()
    transcript = record(model, prompts()[0], [model.draft.fit(TreeShape(2, 2, 8))], 20)
    assert len(transcript.ranks) == 3
    assert transcript.ranks[0].total() == transcript.tokens - 1
    for above, below in zip(transcript.ranks, transcript.ranks[1:], strict=False):
        reached = above.total() - above[None]
        assert reached - 1 <= below.total() <= reached, "after the last but one token nothing follows"


# --- the choice ---


def transcript_of(needed: list[int], tokens: int = 31) -> Transcript:
    """An answer whose tokens are held by trees of these sizes, wherever a round begins and whatever its k."""
    table = [[needed[: depth + 1] for depth in range(4)] for _ in range(tokens - 1)]
    return Transcript(tokens, {1: table, 4: table})


GRID = [TreeShape(size, depth, k) for size in (2, 8, 30) for depth in range(4) for k in (1, 4)]


def best(needed: list[int], verify: dict[int, float], expand: float) -> Prediction:
    return choose(GRID, [transcript_of(needed)], RoundTime(verify, {1: expand, 4: expand}))[0]


def test_curves_decide():
    needed = [2, 7, 12, 28]
    flat = best(needed, {2: 1.0, 8: 1.01, 30: 1.02}, expand=0.01)
    assert flat.shape == TreeShape(30, 3, 1) and flat.tau > 3
    steep = best(needed, {2: 1.0, 8: 4.0, 30: 15.0}, expand=0.01)
    assert steep.shape == TreeShape(2, 0, 1) and steep.tau == 1
    between = best(needed, {2: 1.0, 8: 1.1, 30: 3.0}, expand=0.01)
    assert between.shape == TreeShape(8, 1, 1) and between.tau == 2
    assert between.speed == pytest.approx(3 / 1.11)
    dear = best(needed, {2: 1.0, 8: 1.01, 30: 1.02}, expand=2.0)
    assert dear.shape.depth == 0, "expansions that cost two rounds are not made"


def test_without_acceptance_the_smallest_tree():
    found = best([], {2: 1.0, 8: 1.0, 30: 1.1}, expand=0.0)
    assert found.shape == TreeShape(2, 0, 1) and found.tau == 0


def test_times_are_taken_apart():
    true = RoundTime({2: 10.0, 8: 12.0, 30: 20.0}, {1: 1.0, 4: 3.0})
    shapes = [TreeShape(2, 3, 4), TreeShape(8, 3, 4), TreeShape(30, 3, 4), TreeShape(30, 1, 4), TreeShape(2, 3, 1)]
    found = RoundTime.fitted({shape: true(shape) for shape in shapes})
    for shape in GRID:
        assert found(shape) == pytest.approx(true(shape))
    one_depth = RoundTime.fitted({TreeShape(size, 4, 8): size / 2 for size in (2, 8, 30)})
    assert one_depth(TreeShape(8, 4, 8)) == pytest.approx(4)


def test_noise_does_not_make_larger_passes_faster():
    assert non_decreasing([1, 2, 3]) == [1, 2, 3]
    assert non_decreasing([1, 4, 2, 3, 9, 0]) == [1, 3, 3, 3, 4.5, 4.5]


# --- the whole ---


def test_a_tuned_model_stays_lossless(small, capsys):
    model = pair()
    tuning = model.tune(prompts(), max_new_tokens=12)
    assert model.shape == tuning.shape and tuning.shape in tuning.measured
    assert TreeShape(30, 3, 8) in tuning.measured and tuning.default == TreeShape(30, 3, 8)
    assert tuning.measured[tuning.shape] >= tuning.measured[tuning.default]
    printed = capsys.readouterr().out
    assert "each expansion of k nodes" in printed and "| 30/3/8 |" in printed and "\nchosen: " in printed
    for inputs in prompts():
        expected = generate(model.target.model, inputs, max_new_tokens=20)
        assert model.specgenerate(**inputs, max_new_tokens=20).tolist() == expected.tolist()


def test_the_default_stays_where_nothing_is_faster(small, monkeypatch):
    default = TreeShape(30, 3, 8)
    monkeypatch.setattr(tune, "run_in_turn", lambda model, shapes, *_: {s: float(s == default) for s in shapes})
    model = pair(tree=(12, 3, 4))
    assert model.tune(prompts()[:1], max_new_tokens=8).shape == model.shape == default


def test_prompt_lookup_and_medusa(small):
    model = pair(PromptLookup())
    assert model.tune(prompts()[:1], max_new_tokens=8).shape.top_k in (1, 4, 8)
    head = recorded_model("llava_next", "vispec").draft
    medusa = MedusaHead(head.config).eval()
    medusa.embed_tokens.weight.data = head.embed_tokens.weight.detach()
    model = pair(medusa)
    assert {row.shape.depth for row in model.tune(prompts()[:1], max_new_tokens=8).predictions} == {4}


def test_nothing_to_measure(small):
    with pytest.raises(ValueError, match="no tree can be chosen without prompts"):
        pair().tune([])
    with pytest.raises(ValueError, match="the answers to these prompts end with their first token"):
        pair().tune(prompts(), max_new_tokens=1)
    with pytest.raises(ValueError, match="without a draft head"):
        SpecModel(recorded_model("llava_next", "vispec").target.model).tune(prompts())
