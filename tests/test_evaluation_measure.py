"""How arms take turns, and what is made of the times of repetitions."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vispec import timing
from vispec.evaluation import measure
from vispec.evaluation.loading import load_model
from vispec.evaluation.measure import Answer, Arm, Generation, answer_question, interleave, typical
from vispec.timing import in_turn, turns

PAIR = Path(__file__).parent / "golden" / "llava_next"
PROMPTS = [{"prompt": 0}, {"prompt": 1}, {"prompt": 2}]


@pytest.fixture
def calls(monkeypatch):
    """(model, prompt, kind, longest answer) of every answer that was asked for; each takes as long as its number."""
    found = []

    def answer_question(model, inputs, kind, generation):
        found.append((model, inputs["prompt"], kind, generation.max_new_tokens))
        return Answer([7], 0, wall_time=float(len(found)), decode_time=1.0, acceptance_lengths=[])

    monkeypatch.setattr(measure, "answer_question", answer_question)
    monkeypatch.setattr(measure, "get_ready", lambda *_: None)
    return found


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    at = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: at.seconds))
    return at


def test_every_arm_begins_as_often_as_the_others():
    orders = [in_turn("abc", number) for number in range(6)]
    assert orders[:3] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]] and orders[3:] == orders[:3]


def test_turns_go_prompt_by_prompt_and_rotate():
    found = list(turns("ab", prompts=2, repetitions=2))
    assert [(repetition, prompt) for repetition, prompt, _ in found[::2]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert "".join(arm for _, _, arm in found) == "ab" + "ba" + "ba" + "ab"


@pytest.mark.parametrize(("budget", "made"), [(0.0, 1), (5.9, 1), (6.0, 2), (8.9, 2), (9.0, 3), (100.0, 4)])
def test_a_budget_of_seconds_ends_the_repetitions(clock, budget, made):
    found = []
    for repetition, _, _ in turns("ab", prompts=1, repetitions=4, budget=budget):
        clock.seconds += 1.5
        found.append(repetition)
    assert found == [repetition for repetition in range(made) for _ in "ab"]


def test_all_arms_answer_every_prompt(calls):
    arms = [Arm("plain", "M", "baseline"), Arm("ours", "M", "spec"), Arm("other", "N", "spec")]
    seen = []
    found = interleave(
        arms, PROMPTS, Generation(0.0, 30), repetitions=2, warm_up_tokens=5, on_prompt=lambda *part: seen.append(part)
    )
    warm_up, counted = calls[:3], calls[3:]
    assert warm_up == [("M", 0, "baseline", 5), ("M", 0, "spec", 5), ("N", 0, "spec", 5)]
    assert len(counted) == 3 * 3 * 2 and all(longest == 30 for *_, longest in counted)
    assert [prompt for _, prompt, _, _ in counted] == [0] * 3 + [1] * 3 + [2] * 3 + [0] * 3 + [1] * 3 + [2] * 3
    assert found.keys() == {"plain", "ours", "other"}
    # in the second repetition, another arm begins: "plain" is the last one to answer the first prompt
    times = {name: [[answer.wall_time for answer in answers] for answers in found[name]] for name in found}
    assert times["plain"][0] == [4, 15] and times["ours"][0] == [5, 13] and times["other"][0] == [6, 14]
    assert [part[:2] for part in seen] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert all(answers == {name: found[name][prompt][time] for name in found} for time, prompt, answers in seen)


@pytest.mark.parametrize(("tokens", "longest"), [(None, 30), (16, 16), (40, 30)])
def test_a_warm_up_is_never_longer_than_an_answer(calls, tokens, longest):
    interleave([Arm("plain", "M", "baseline")], PROMPTS, Generation(0.0, 30), 1, warm_up_tokens=tokens)
    assert [call[-1] for call in calls] == [longest, 30, 30, 30]


def test_typical_times_are_medians():
    answers = [Answer([1, 2], 0, wall, decode, [1]) for wall, decode in ((3.0, 1.0), (1.0, 9.0), (2.0, 2.0))]
    assert typical(answers) == Answer([1, 2], 0, 2.0, 2.0, [1])


def test_every_kind_of_arm_gives_the_same_answer():
    model = load_model(str(PAIR / "target"), str(PAIR / "draft_vispec"), dtype="float32")
    inputs = {"input_ids": torch.randint(3, 30, (1, 9), generator=torch.Generator().manual_seed(0))}
    kinds = ("baseline", "spec", "generate")
    answers = {kind: answer_question(model, inputs, kind, Generation(0.0, 10)) for kind in kinds}
    for answer in answers.values():
        assert answer.output_ids == answers["baseline"].output_ids
        assert 0 < answer.decode_time < answer.wall_time
    assert answers["generate"].last_round == answers["baseline"].last_round == len(answers["baseline"].output_ids) - 2
    with pytest.raises(ValueError, match="found temperature 0.7"):
        answer_question(model, inputs, "generate", Generation(0.7, 10))
