"""Policies: plain steps among rounds change no token and no tree, and `Auto` goes where the tokens are."""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice

import pytest
import torch
from test_batches import batch_of, model_of
from tiny_models import generate, image_prompt, random_head, random_target, recorded_case, recorded_model

from vispec import SpecModel
from vispec.model import decoding, policies
from vispec.model.decoding import Decoder
from vispec.model.policies import SHAPES, Always, Auto
from vispec.model.rows import Round, Stop
from vispec.model.sampling import Choice
from vispec.model.shape import TreeShape
from vispec.model.tree import EMPTY

SMALL, WIDE = TreeShape(6, 2, 2), TreeShape(12, 3, 4)
METHODS = ("vispec", "eagle2", "eagle3", "medusa", "lookup")
NEW_TOKENS = 40


class InTurn:
    """A policy: rounds and plain steps in this order, again and again."""

    def __init__(self, *order: TreeShape | None, waiting: int):
        self.shapes = tuple(dict.fromkeys(filter(None, order)))
        self.waiting = waiting
        self._order = cycle(order)

    def shape(self) -> TreeShape | None:
        return next(self._order)

    def learn(self, shape, rounds) -> None:
        pass


class WatchedDecoder(Decoder):
    """Keeps each tree by row, tokens of the answer before it, and shape; `empty` ones have no node but the root."""

    def __init__(self, model: SpecModel, empty: bool = False):
        super().__init__(model.target, model.draft)
        self.trees: dict[tuple, tuple[list[int], list[int]]] = {}
        self.waited: list[int] = []
        self._empty = empty

    def _round(self, seat, rows, answers, choice, shape):
        places = [(answer.row, answer.new, shape) for answer in answers]
        self.waited += [answer.waiting for answer in answers]
        run = type(seat.steps).run

        def watched(key, *args):
            value = run(seat.steps, key, *args)
            if key[0] == "draft":
                self.trees |= zip(places, zip(value.tokens.tolist(), value.parents.tolist(), strict=True), strict=True)
            return value._replace(tokens=self._without_nodes(value.tokens)) if key[0] == "draft" else value

        seat.steps.run = watched
        return super()._round(seat, rows, answers, choice, shape)

    def _without_nodes(self, tokens):
        return tokens.index_fill(1, torch.arange(1, tokens.shape[1]), EMPTY) if self._empty else tokens


def decode(decoder: Decoder, prompts: list[dict], policy) -> tuple[list[list[int]], list[Round]]:
    """The rows' answers, and all that their rounds and plain steps brought."""
    answers, found = [[] for _ in prompts], []
    separate = [(one["input_ids"], {k: v for k, v in one.items() if k != "input_ids"}) for one in prompts]
    stops = [Stop(NEW_TOKENS, frozenset())] * len(prompts)
    for number, step in enumerate(decoder.rounds(separate, stops, Choice(), policy)):
        for row, one in step.items():
            answers[row] += one.tokens
            found += [one] if number else []
    return answers, found


ORDERS = {
    "alternating": ((None, SMALL, None, None, WIDE), 8),
    "many plain steps in a row": ((WIDE, *[None] * 11, SMALL, SMALL), 5),
    "plain steps first": ((*[None] * 7, WIDE, WIDE), 5),
}


@pytest.mark.parametrize(
    ("method", "rows", "captured"),
    [*((method, rows, False) for method in METHODS for rows in (1, 3)), ("vispec", 3, True), ("lookup", 1, True)],
)
def test_plain_steps_among_rounds(method, rows, captured, request):
    """Answers are the target's; every tree is what the draft grows there when it has been told of one token after the
    other."""
    target = random_target("qwen2_5_vl", 2, vocabulary=12)
    prompts = [image_prompt(target, seed, layout) for seed, layout in enumerate((".a.", ".", "a.b"))][:rows]
    expected = [generate(target, p, max_new_tokens=NEW_TOKENS)[0, p["input_ids"].shape[1] :].tolist() for p in prompts]
    model = model_of(target, method)
    fitted = {shape: model.draft.fit(shape) for shape in (SMALL, WIDE)}
    reference = {}
    for shape in fitted.values():
        decoder = WatchedDecoder(model, empty=True)
        for row, prompt in enumerate(prompts):
            answers, _ = decode(decoder, [prompt], Always(shape))
            assert answers == [expected[row]]
            reference |= {(row, *place): tree for (_, *place), tree in decoder.trees.items()}
    accepted = 0
    if captured:
        request.getfixturevalue("captures")
        model = model_of(target, method)
    for order, waiting in ORDERS.values():
        decoder = WatchedDecoder(model)
        policy = InTurn(*(fitted.get(shape) for shape in order), waiting=max(waiting, fitted[WIDE].levels + 1))
        for _ in range(3 if captured else 1):  # steps are captured when they are needed for the third time
            policy._order = cycle(fitted.get(shape) for shape in order)
            answers, rounds = decode(decoder, prompts, policy)
            assert answers == expected
            assert len(decoder.trees) > 2 and all(decoder.trees[key] == reference[key] for key in decoder.trees)
        assert max(decoder.waited) <= policy.waiting
        assert all(one.accepted == 0 for one in rounds if not one.drafted)
        accepted += sum(one.accepted for one in rounds)
    assert accepted > 5 or rows == 1, "nothing was accepted, so nothing was tested"


def test_a_policy_in_a_seat_with_more_room(captures, monkeypatch):
    """Another policy had let more pairs wait; this one's draft is told in time for its own slots."""
    monkeypatch.setattr(decoding, "CAPACITY_AHEAD", 4)
    target = random_target("llava_1.5", 5, vocabulary=12)
    prompts = [image_prompt(target, 0, ".")]
    decoder = WatchedDecoder(model_of(target, "eagle2"))
    expected, _ = decode(decoder, prompts, Always(None))
    for waiting in (60, 5, 60):
        decoder.waited.clear()
        answers, _ = decode(decoder, prompts, InTurn(WIDE, *[None] * 9, waiting=waiting))
        assert answers == expected
        assert max(decoder.waited) <= 5 if waiting == 5 else max(decoder.waited) >= 10


def test_plain_steps_count_for_no_acceptance_length(monkeypatch):
    model, inputs = recorded_model("llava_next", "vispec"), recorded_case("llava_next", "vispec", 0).inputs
    model = model.with_tree("12/3/4")
    expected = model.baseline_generate(**inputs, max_new_tokens=NEW_TOKENS)
    monkeypatch.setattr(model, "_policy", lambda *_: InTurn(WIDE, None, None, waiting=8))
    answer, new, last, lengths = model.specgenerate(
        **inputs, max_new_tokens=NEW_TOKENS, log=True, return_acceptance_len=True
    )
    assert torch.equal(answer, expected) and sum(lengths) > 0
    drafted, plain = len(lengths), last + 1 - len(lengths)
    assert drafted == -(-(last + 1) // 3) and plain > 1, "every third round has a draft, all are counted"
    assert sum(lengths) + drafted + plain + 1 >= new
    first, *steps = model.stream(**inputs, max_new_tokens=NEW_TOKENS)
    assert first.accepted is None
    assert [step.accepted is None for step in steps] == list(islice(cycle([False, True, True]), len(steps)))


# --- Auto, by a clock that tests set ---

COSTS = {None: 1.0, TreeShape(6, 2, 2): 1.25, WIDE: 1.4, TreeShape(16, 7, 2): 1.6, TreeShape(30, 3, 8): 1.8}
"""Seconds of a plain step and of rounds."""
GOOD = {TreeShape(6, 2, 2): 1.0, WIDE: 2.0, TreeShape(16, 7, 2): 3.5, TreeShape(30, 3, 8): 2.5}
"""Accepted tokens a round of a good draft: the fastest is 16/7/2."""
USELESS = dict.fromkeys(GOOD, 0.0)


class Simulated:
    """Answers where rounds take and bring what tables say, by `Auto` unless another policy is named."""

    def __init__(self, monkeypatch, noise: float = 0.0):
        self.now = 0.0
        monkeypatch.setattr(policies, "now", lambda: self.now)
        self.auto = Auto(lambda shape: shape)
        self.rounds: Counter = Counter()
        self._owed = Counter()  # fractions of tokens
        self._noise, self._random = noise, torch.Generator().manual_seed(0)

    def answer(self, accepted: dict, tokens: int = 64, seconds: dict = COSTS, policy=None) -> TreeShape | None:
        """Returns the first shape."""
        policy, done, shapes = policy or self.auto.answer(), 0, []
        while done < tokens:
            shapes.append(shape := policy.shape())
            self._owed[shape] += accepted.get(shape, 0.0)
            count = int(self._owed[shape])
            self._owed[shape] -= count
            self.now += seconds[shape] * (1 + self._noise * float(torch.rand(1, generator=self._random)))
            policy.learn(shape, [Round([5] * (count + 1), count, 0 if shape is None else shape.levels, False)])
            done += count + 1
        self.rounds.update(shapes)
        return shapes[0]

    @property
    def lost(self) -> float:
        """Seconds that rounds took beyond plain steps."""
        return sum(count * (COSTS[shape] - 1) for shape, count in self.rounds.items())


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_useless_draft_costs_little(monkeypatch, noise):
    found = Simulated(monkeypatch, noise)
    for _ in range(10):
        found.answer(USELESS)
    assert found.rounds.total() == 640 and found.auto.best is None
    assert 0 < found.lost < 0.02 * 640
    assert [shape for shape in found.rounds if shape is not None] == [SHAPES[0]], "one shape is enough to see it"


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_good_draft_gets_its_fastest_shape(monkeypatch, noise):
    found, fastest = Simulated(monkeypatch, noise), TreeShape(16, 7, 2)
    for _ in range(10):
        found.answer(GOOD)
    assert found.auto.best == fastest
    drafted = sum(count for shape, count in found.rounds.items() if shape is not None)
    assert found.rounds[fastest] > 0.75 * drafted and found.rounds[None] < 20
    spent = []
    for policy in (None, Always(fastest)):
        before = found.now
        for _ in range(100):
            found.answer(GOOD, policy=policy)
        spent.append(found.now - before)
    assert spent[0] < spent[1] / 0.95


def test_what_was_learned_stays_for_the_next_answer(monkeypatch):
    found = Simulated(monkeypatch)
    assert found.answer(GOOD, tokens=200) is None, "what a plain step takes is measured first"
    assert found.answer(GOOD, tokens=3) == TreeShape(16, 7, 2)


def test_a_draft_that_becomes_good_comes_back(monkeypatch):
    found = Simulated(monkeypatch)
    found.answer(USELESS, tokens=300)
    assert found.auto.best is None
    found.answer(GOOD, tokens=500)
    assert found.auto.best is not None, "not tried again"
    found.answer(GOOD, tokens=3000)
    assert found.auto.best == TreeShape(16, 7, 2)


def test_a_draft_that_becomes_useless_is_left(monkeypatch):
    found = Simulated(monkeypatch)
    found.answer(GOOD, tokens=640)
    found.answer(USELESS, tokens=200)
    assert found.auto.best is None
    found.rounds.clear()
    found.answer(USELESS, tokens=640)
    assert found.lost < 0.03 * 640


def test_rounds_that_become_dear_are_left(monkeypatch):
    """Another program takes the machine's cores, say, and trees no longer pay."""
    found, dear = Simulated(monkeypatch), {shape: 6 * cost if shape else cost for shape, cost in COSTS.items()}
    found.answer(GOOD, tokens=640)
    found.answer(GOOD, tokens=300, seconds=dear)
    assert found.auto.best is None


def test_changes_are_rare(monkeypatch):
    """Two shapes that are equally fast but for noise do not take turns."""
    found = Simulated(monkeypatch, noise=0.2)
    equal = {shape: COSTS[shape] * 2 - 1 for shape in GOOD}
    bests = []
    for _ in range(300):
        found.answer(equal, tokens=8)
        bests.append(found.auto.best)
    changes = sum(a != b for a, b in zip(bests[20:], bests[21:], strict=False))
    assert changes <= 15 and None not in bests[20:]


def test_shapes_are_those_that_the_draft_can_fill():
    auto = Auto(lambda shape: shape.fitted(2, depth=1))
    assert auto.shapes == (TreeShape(7, 1, 2), TreeShape(6, 1, 2)) == auto.answer().shapes


# --- Auto in a model ---


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("head", ["random", "recorded"])
def test_answers_of_auto_are_the_targets(head, captured, request):
    """With a useless draft and a good one, alone and in batches, from one answer to the next."""
    if captured:
        request.getfixturevalue("captures")
    recorded = recorded_model("llava_next", "vispec")
    target = recorded.target.model
    draft = recorded.draft if head == "recorded" else random_head(target, "vispec", seed=3)
    model = SpecModel(target, draft, tree="auto")
    prompts = [image_prompt(target, seed, layout) for seed, layout in enumerate((".a.", ".", "..a"))]
    accepted = 0
    for inputs in [*prompts, *prompts, batch_of(prompts)]:
        answer, lengths = model.specgenerate(**inputs, max_new_tokens=64, return_acceptance_len=True)
        assert torch.equal(answer, model.baseline_generate(**inputs, max_new_tokens=64))
        accepted += sum(lengths) if len(answer) == 1 else sum(map(sum, lengths))
    assert (accepted > 10) == (head == "recorded")  # in trials alone, where the clock says that plain steps pay


def test_threads_share_what_auto_has_learned():
    recorded = recorded_model("llava_next", "vispec")
    model = SpecModel(recorded.target.model, recorded.draft, tree="auto")
    prompts = [recorded_case("llava_next", "vispec", case).inputs for case in range(3)]
    expected = [model.baseline_generate(**inputs, max_new_tokens=48) for inputs in prompts]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda inputs: model.specgenerate(**inputs, max_new_tokens=48), prompts * 2))
    finally:
        sys.setswitchinterval(before)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected * 2, strict=True))
