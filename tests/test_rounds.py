"""Rounds work on tensors that stay where they are, so that a GPU can replay them; here recordings are replayed."""

import logging
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from conftest import CAPTURED_BUCKET
from recorded_steps import break_off, record
from test_batches import batch_of, model_of, prompts_of
from tiny_models import random_target, recorded_case, recorded_model, same_target, text_prompt
from transformers import BitsAndBytesConfig

from vispec import SpecModel
from vispec.model import decoding, graphs
from vispec.model.cache import TreeCache
from vispec.model.decoding import Decoder
from vispec.model.drafts import lookup
from vispec.model.graphs import Steps
from vispec.model.sampling import Choice
from vispec.model.seats import Seat
from vispec.model.target import Target

ARMS = ("specgenerate", "baseline_generate")
STEPS = {"draft", "verify", "keep", "plain", "add"}


def tensors_of(value) -> list[torch.Tensor]:
    """All tensors that a step is given."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, TreeCache):
        return [value.lengths, *value._buffers.values()]
    fields = value if isinstance(value, tuple) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for field in fields for tensor in tensors_of(field)]


def answers(model: SpecModel, inputs: dict, **options) -> list:
    """The answers of both arms, and what was accepted."""
    found = []
    for arm in ARMS:
        torch.manual_seed(3)
        out, lengths = getattr(model, arm)(**inputs, **options, return_acceptance_len=True)
        found += [out.tolist(), lengths]
    return found


@pytest.mark.parametrize(
    ("family", "method", "rows", "alignment"),
    [
        ("llava_next", "vispec", 1, None),
        ("llava_next", "vispec", 1, "aligned"),
        ("qwen2_5_vl", "vispec", 4, "aligned"),
        ("qwen2_5_vl", "eagle2", 1, None),
        ("llava_1.5", "medusa", 4, None),
        ("llava_1.5", "lookup", 4, None),
    ],
)
def test_replayed_rounds_are_the_eager_ones(family, method, rows, alignment, request):
    """Rows leave the batch on the way; a second prompt in the same tensors replays what the first one captured."""
    target = same_target(random_target(family, 2, vocabulary=12))
    prompts = prompts_of(target)
    first = model_of(target, method).baseline_generate(**prompts[0], max_new_tokens=12)
    target.generation_config.eos_token_id = int(first[0, -3])
    batches = [batch_of(prompts[:rows]), batch_of([prompts[1]] * rows)]
    expected = [answers(model_of(target, method), batch, max_new_tokens=24) for batch in batches]

    captures = request.getfixturevalue("captures")
    if alignment is not None:
        request.getfixturevalue(alignment)
    model = model_of(target, method)
    assert [answers(model, batch, max_new_tokens=24) for batch in batches] == expected
    assert {kind for kind, *_ in captures} == STEPS
    assert len({key[3] for key in captures if key[0] == "verify"}) > 1, "no answer went on into a second bucket"
    assert [answers(model, batch, max_new_tokens=24) for batch in batches] == expected
    assert set(captures.values()) == {1}, "captured again although nothing had changed"
    assert model.captured == "all"


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 1.3, "top_p": 0.8, "top_k": 5}])
def test_sampling_is_captured_too(settings, request):
    """Replayed random numbers are new ones: with one seed both ways draw the same."""
    target = random_target("llava_1.5", 0, vocabulary=12)
    inputs = text_prompt(target, 5, seed=0)
    expected = answers(model_of(target, "vispec"), inputs, **settings, max_new_tokens=40)
    captures = request.getfixturevalue("captures")
    assert answers(model_of(target, "vispec"), inputs, **settings, max_new_tokens=40) == expected
    assert captures


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ["vispec", "medusa", "lookup"])
def test_an_answer_moves_to_larger_tensors(request, monkeypatch, method, rows):
    """Rounded bounds may be beyond the tensors that are left; texts of several lengths go along whole."""
    monkeypatch.setattr(lookup, "MOST_BRANCHES", 8)
    target = random_target("llava_1.5", 5, vocabulary=12)
    inputs = batch_of([text_prompt(target, length, seed=length) for length in (3, 9, 15)[:rows]])
    expected = answers(model_of(target, method), inputs, max_new_tokens=60)
    assert expected[0] == expected[2], "both arms answer alike"
    request.getfixturevalue("captures")
    monkeypatch.setattr(decoding, "CAPACITY_AHEAD", 20)
    assert answers(model_of(target, method), inputs, max_new_tokens=60) == expected


def test_a_long_answer_moves_a_few_times(request, monkeypatch):
    """Few times: each time the room is doubled, but never beyond what the answer can need."""
    target = random_target("llava_1.5", 5, vocabulary=12)
    inputs = batch_of([text_prompt(target, length, seed=length) for length in (3, 9)])
    expected = answers(model_of(target, "vispec"), inputs, max_new_tokens=120)
    request.getfixturevalue("captures")
    monkeypatch.setattr(decoding, "CAPACITY_AHEAD", 4)
    capacities, enlarge = [], Seat.enlarge

    def watched(self, capacity):
        capacities.append((self.capacity, capacity))
        enlarge(self, capacity)

    monkeypatch.setattr(Seat, "enlarge", watched)
    assert answers(model_of(target, "vispec"), inputs, max_new_tokens=120) == expected
    assert any(after >= 2 * before for before, after in capacities) and len(capacities) <= 3
    assert max(after for _, after in capacities) <= 9 + 120 + CAPTURED_BUCKET + 64


@pytest.mark.parametrize("arm", ARMS)
def test_shapes_and_addresses_stay_while_a_key_does(captures, arm, monkeypatch):
    """From round to round, and from one answer to the next."""
    places: dict[tuple, set] = {}
    run = Steps.run

    def watched(self, key, reset, step, *args):
        tensors = tensors_of(args)
        assert len(tensors) > 5
        places.setdefault(key, set()).add(tuple((t.data_ptr(), t.shape, t.stride()) for t in tensors))
        return run(self, key, reset, step, *args)

    monkeypatch.setattr(Steps, "run", watched)
    recorded = recorded_model("llava_next", "vispec")
    model = SpecModel(recorded.target.model, recorded.draft, 12, 3, 4)
    for case in (0, 1, 0):
        inputs = recorded_case("llava_next", "vispec", case).inputs
        getattr(model, arm)(**inputs, max_new_tokens=40)
        getattr(model, arm)(**inputs, max_new_tokens=3)
    assert len(places) > 3 and all(len(found) == 1 for found in places.values())


@pytest.mark.parametrize("method", ["vispec", "eagle2", "eagle3", "msd", "specvlm", "medusa", "lookup"])
def test_one_transfer_a_round(method, monkeypatch):
    """Beside the outcome of a round nothing waits for the device."""
    transfers = Counter()
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__index__", "__float__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, name=name, original=original):
            transfers[name] += 1
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    target = random_target("qwen2_5_vl", 0, vocabulary=12)
    model = model_of(target, method)
    for speculate in (True, False):
        stream = model.stream(**text_prompt(target, 5, seed=0), max_new_tokens=30, speculate=speculate)
        next(stream)
        transfers.clear()
        rounds = len(list(stream))
        assert transfers == {"tolist": rounds} and rounds > 3


@pytest.mark.parametrize("operations", [5, None])
@pytest.mark.parametrize("failing", sorted(STEPS))
def test_a_capture_that_fails_half_way(captures, failing, operations, monkeypatch, caplog):
    """After some operations of a step, or after all: this step goes on as it is, all others are captured."""
    target = random_target("llava_1.5", 0, vocabulary=12)
    inputs = text_prompt(target, 5, seed=0)
    expected = model_of(target, "vispec").baseline_generate(**inputs, max_new_tokens=20)
    kinds, run = [], Steps.run

    def watched(self, key, *args):
        kinds.append(key[0])
        return run(self, key, *args)

    def capture(step):
        return break_off(step, operations) if kinds[-1] == failing else record(step)

    monkeypatch.setattr(Steps, "run", watched)
    monkeypatch.setattr(graphs, "cuda_capture", lambda device: capture)
    captures.clear()
    caplog.clear()
    model = model_of(target, "vispec", tree=(30, 3, 8))  # a cache with two trees in it has no room for a third
    for _ in range(3):
        assert torch.equal(model.specgenerate(**inputs, max_new_tokens=20), expected)
        assert torch.equal(model.baseline_generate(**inputs, max_new_tokens=20), expected)
    reason = "capture failed (operation not permitted when stream is capturing)"
    assert {r.getMessage() for r in caplog.records} == {f"{failing} goes on without a CUDA graph: {reason}"}
    assert len(caplog.records) == model._decoder.failed_captures <= 3, "tried again although it had failed"
    assert {kind for kind, *_ in captures} == STEPS - {failing} and set(captures.values()) == {1}
    assert model.captured == "some"


def test_threads_do_not_meet_in_a_step(captures, monkeypatch):
    """Eager steps, captures and replays of one thread wait for those of the other, and for its random numbers."""
    inside, met = [], []

    @contextmanager
    def alone():
        me = threading.get_ident()
        met.extend(other for other in inside if other != me)
        inside.append(me)
        time.sleep(0.001)
        yield
        inside.remove(me)

    def guarded(function):
        def call(*args):
            with alone():
                return function(*args)

        return call

    monkeypatch.setattr(graphs, "cuda_capture", lambda device: lambda step: guarded(guarded(record)(step)))
    steps = [(Decoder, name) for name in ("_draft", "_verify", "_keep", "_verify_root", "_add")]
    for owner, name in (*steps, (Choice, "choose")):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))
    target = random_target("llava_1.5", 0, vocabulary=12)
    model = model_of(target, "vispec")
    prompts = [text_prompt(target, length, seed=length) for length in (5, 7)]
    expected = [model.baseline_generate(**inputs, max_new_tokens=30) for inputs in prompts]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda inputs: model.specgenerate(**inputs, max_new_tokens=30), prompts * 2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected * 2, strict=True))
    assert met == []


def test_why_nothing_is_captured_is_said_once(caplog):
    target = random_target("llava_1.5", 0, vocabulary=12)
    with caplog.at_level(logging.INFO, "vispec"):
        model = model_of(target, "vispec")
        for _ in range(2):
            answers(model, text_prompt(target, 5, seed=0), max_new_tokens=4)
    assert [r.getMessage() for r in caplog.records] == ["decoding runs without CUDA graphs: the target is on cpu"]
    devices = [torch.device(name) for name in ("cpu", "cuda:0", "cuda:1", "cpu")]
    assert graphs.obstacle(target, model.target.decoder, devices) == "the target is spread over cpu, cuda:0, cuda:1"


def obstacle_of(target) -> str | None:
    return graphs.model_obstacle(target, Target(target).decoder)


def test_models_that_make_the_host_wait_are_known():
    assert obstacle_of(random_target("llava_1.5", 0)) is None
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    dynamic = random_target("llava_1.5", 0, rope_scaling=rope, rope_parameters=rope)
    assert "dynamic rotary embeddings" in obstacle_of(dynamic)
    mixture = random_target("llava_1.5", 0)
    Target(mixture).decoder.layers[1].mlp.experts = torch.nn.ModuleList()
    assert obstacle_of(mixture) == "LlamaMLP chooses its experts by values"
    for config in ({"quant_method": "bitsandbytes"}, BitsAndBytesConfig(load_in_8bit=True)):
        quantised = random_target("llava_1.5", 0)
        quantised.config.quantization_config = config
        assert obstacle_of(quantised) == "the target is quantised by bitsandbytes"
