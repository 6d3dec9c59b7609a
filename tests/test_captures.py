"""Seats between answers: what `warmup` captures, what temperatures share, and what `free` gives back."""

import gc
import weakref

import pytest
import torch
from conftest import CAPTURED_BUCKET
from test_batches import batch_of, model_of
from test_rounds import ARMS, STEPS, answers
from tiny_models import image_prompt, random_target, text_prompt

from vispec.model.policies import MOST_WAITING
from vispec.model.seats import Seat


@pytest.fixture
def seats(monkeypatch) -> list[weakref.ref]:
    """Every seat that is made."""
    made, init = [], Seat.__init__

    def watched(self, *args, **options):
        made.append(weakref.ref(self))
        init(self, *args, **options)

    monkeypatch.setattr(Seat, "__init__", watched)
    return made


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ["vispec", "eagle2", "eagle3", "msd", "specvlm", "medusa", "lookup"])
def test_after_warmup_all_steps_are_replayed(captures, eager, method, rows):
    """Prompts of several lengths with images, which the draft may compress; whatever is accepted, in both arms."""
    target = random_target("qwen2_5_vl", 0, vocabulary=12)
    prompts = [image_prompt(target, seed, layout) for seed, layout in enumerate((".c.c.", "..cc.c.", "cc.a"))]
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    assert CAPTURED_BUCKET < min(lengths) < max(lengths)
    model = model_of(target, method)
    model.warmup(min(lengths), max(lengths) - min(lengths) + 40, rows=rows)
    assert {kind for kind, *_ in captures} == STEPS
    eager.clear()
    for prompt in prompts if rows == 1 else [batch_of(prompts)]:
        for temperature in (0.0, 1.0):
            spec, accepted, plain, _ = answers(model, prompt, temperature=temperature, max_new_tokens=40)
            assert (temperature or spec == plain) and len(accepted) > 0
    assert {key for key in eager if key[1] == rows} == set(), "not all was captured"
    assert {key[1] for key in eager} <= set(range(1, rows)), "rows that are left when others have ended"


def test_after_warmup_all_steps_of_auto_are_replayed(captures, eager):
    """Also plain steps between rounds, after which more pairs than usual wait for the draft."""
    target = random_target("llava_1.5", 0, vocabulary=12)
    model = model_of(target, "eagle2").with_tree("auto")
    model.warmup(5, 100)
    eager.clear()
    inputs = text_prompt(target, 5, seed=0)
    for _ in range(2):
        assert torch.equal(
            model.specgenerate(**inputs, max_new_tokens=100), model.baseline_generate(**inputs, max_new_tokens=100)
        )
    assert eager == set()


def test_warmup_without_graphs_changes_no_answer():
    target = random_target("llava_1.5", 0, vocabulary=12)
    inputs = text_prompt(target, 5, seed=0)
    model, expected = model_of(target, "vispec"), answers(model_of(target, "vispec"), inputs, max_new_tokens=30)
    model.warmup(5, 30)
    assert answers(model, inputs, max_new_tokens=30) == expected and model.captured == "none"


def test_one_decoder_serves_all_temperatures(captures, seats):
    """And both arms: no other seat is taken, and nothing is captured again."""
    target = random_target("llava_1.5", 0, vocabulary=12)
    inputs = text_prompt(target, 5, seed=0)
    model = model_of(target, "vispec")
    expected = [answers(model, inputs, temperature=temperature, max_new_tokens=40) for temperature in (0.0, 1.0) * 3]
    before, taken = sum(captures.values()), len(seats)
    for temperature in (0.5, 0.9):
        answers(model, inputs, temperature=temperature, top_p=0.9, max_new_tokens=40)
    assert [answers(model, inputs, temperature=temperature, max_new_tokens=40) for temperature in (0.0, 1.0)] == (
        expected[:2]
    )
    assert sum(captures.values()) == before > 0 and taken == len(seats) == 1


def test_what_was_captured_over_weights_that_moved_is_void(captures):
    target = random_target("llava_1.5", 0, vocabulary=12)
    inputs = text_prompt(target, 5, seed=0)
    model = model_of(target, "eagle2")
    before = answers(model, inputs, max_new_tokens=40)
    assert captures
    for layer in model.target.decoder.layers:
        layer.mlp.up_proj.weight.data = -layer.mlp.up_proj.weight.data  # elsewhere in memory
    expected = answers(model_of(target, "eagle2"), inputs, max_new_tokens=40)
    assert answers(model, inputs, max_new_tokens=40) == expected != before


def test_an_arm_that_needs_more_takes_the_idle_seats_place(captures, seats):
    """The baseline came first, so its seat has no memory for a draft; what is idle is never more than one seat."""
    target = random_target("llava_1.5", 0, vocabulary=12)
    inputs = text_prompt(target, 5, seed=0)
    expected = answers(model_of(target, "vispec"), inputs, max_new_tokens=20)
    model = model_of(target, "vispec")
    for arm in reversed(ARMS * 2):
        out = getattr(model, arm)(**inputs, max_new_tokens=20).tolist()
        assert out == expected[2 * ARMS.index(arm)]
        gc.collect()
        assert sum(seat() is not None and seat() in model._decoder._idle for seat in seats) == 1
        assert sum(len(seat().steps._replays) > 0 for seat in seats if seat() is not None) <= 1


def test_the_baselines_seat_serves_a_draft(captures, seats):
    """A seat with room enough is used as it is: only the draft's memory is added."""
    target = random_target("llava_1.5", 0, vocabulary=12)
    inputs = text_prompt(target, 5, seed=0)
    model = model_of(target, "vispec", tree=(2, 0, 1))
    expected = answers(model_of(target, "vispec", tree=(2, 0, 1)), inputs, max_new_tokens=12)
    seats.clear()
    width = model.target.text_config.hidden_size
    model._decoder._idle.append(Seat(model.target, 1, 200, MOST_WAITING, width, looks=False))
    for _ in range(2):
        assert model.baseline_generate(**inputs, max_new_tokens=12).tolist() == expected[2]
        assert model.specgenerate(**inputs, max_new_tokens=12).tolist() == expected[0]
    assert len(seats) == 1


def test_free_gives_the_idle_seat_back(captures, seats):
    target = random_target("llava_1.5", 0, vocabulary=12)
    inputs = text_prompt(target, 5, seed=0)
    model = model_of(target, "vispec")
    expected = answers(model, inputs, max_new_tokens=30)
    gc.collect()
    assert [seat() for seat in seats] != [None], "nothing waited for the next answer"
    model.free()
    gc.collect()
    assert [seat() for seat in seats] == [None]
    assert answers(model, inputs, max_new_tokens=30) == expected and len(seats) == 2


def test_where_nothing_is_captured_no_seat_waits(seats):
    target = random_target("llava_1.5", 0, vocabulary=12)
    model = model_of(target, "vispec")
    answers(model, text_prompt(target, 5, seed=0), max_new_tokens=9)
    gc.collect()
    assert [seat() for seat in seats] == [None, None]
