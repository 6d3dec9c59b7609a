"""The decoding loops: tree speculative decoding, and the plain baseline over the same machinery.

Both are iterators over rounds. The first item is the token that the prompt's own pass gives; each further item is one
round: the tokens it added and how many of them had been drafted. Any number of generations can run side by side on one
decoder: what a generation remembers lives in tensors of its own, its seat.

Prompts of a batch are read one by one, without padding, and then decoded together. A row whose answer has ended leaves
the batch: the last row takes its place.

A round is two steps with one transfer from the device between them: the target verifies a tree, then the draft reads
what was kept and grows the next tree. Steps work in place on the seat's tensors. All that the host tells them is an
upper bound of the used lengths; where steps are captured it is rounded up, so that shapes change rarely.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from vispec.model.acceptance import Sampling, accept
from vispec.model.cache import TreeCache
from vispec.model.draft import BaseHead, DraftState
from vispec.model.draft_vocab import DraftOutput
from vispec.model.families import image_spans
from vispec.model.lookup import LookupState, PromptLookup
from vispec.model.medusa import MedusaState
from vispec.model.rows import Rows
from vispec.model.target import Prompt, Target
from vispec.model.tree import Tree, TreeShape

CAPACITY_AHEAD = 1024
"""Slots for new tokens that a seat has at first; where an answer needs more, all of its slots are doubled."""
BUCKET = 128
"""Lengths are rounded up to a multiple of so many where steps are captured; a graph serves all lengths of a bucket."""


@dataclass
class Round:
    """What one round added to one row."""

    tokens: list[int]
    """New ids, in order, cut at the end token and at the token limit."""
    accepted: int
    """Draft tokens that verification accepted, before any cut."""


@dataclass(frozen=True)
class Stop:
    """When an answer ends: after an end token, or at `max_new_tokens`."""

    max_new_tokens: int
    eos_token_ids: frozenset[int]

    def cut(self, tokens: list[int], already: int) -> tuple[list[int], bool]:
        """The part of a round's tokens that belongs to the answer, and whether the answer ends with it."""
        tokens = tokens[: self.max_new_tokens - already]
        end = next((i for i, token in enumerate(tokens) if token in self.eos_token_ids), None)
        if end is not None:
            return tokens[: end + 1], True
        return tokens, already + len(tokens) >= self.max_new_tokens


@dataclass
class Drafted(Rows):
    """What a generation with a draft remembers besides."""

    state: DraftState | MedusaState | LookupState
    tree: Tree
    outcome: torch.Tensor
    """(B, 1 + D + 1) of the last verification: how many drafted tokens were accepted; then the token after each kept
    node: the accepted ones, the next root, and surplus."""
    features: torch.Tensor
    """(B, D + 1, H) the target's features of the root and the kept nodes."""


@dataclass
class Generation(Rows):
    """What lasts from round to round; B rows."""

    cache: TreeCache
    rope_delta: torch.Tensor | None
    root: torch.Tensor
    """(B,) the newest token, whose key is not in the cache yet."""
    drafted: Drafted | None = None

    def positions(self, depths: torch.Tensor) -> torch.Tensor:
        """(B, n) target positions of tokens at these depths under the root."""
        positions = self.cache.lengths[:, None] + depths
        return positions if self.rope_delta is None else positions + self.rope_delta


class _Seat:
    """Tensors for generations of up to `rows` rows, one generation after the other, and what was captured over them."""

    def __init__(self, target: Target, rows: int, capacity: int, draft_capacity: int):
        self.rows, self.capacity, self.draft_capacity = rows, capacity, draft_capacity
        self.cache = target.new_cache(rows, capacity)
        self.generation: Generation | None = None
        self.steps = target.new_steps()
        self._target = target

    def has(self, rows: int, capacity: int, draft_capacity: int) -> bool:
        return self.rows >= rows and self.capacity >= capacity and self.draft_capacity >= draft_capacity

    @torch.inference_mode()
    def place(self, row: int, one: Generation) -> None:
        """Hold a generation of one row, whose cache is that of the place already."""
        if self.generation is None:
            others = replace(one, cache=None).room_for(self.rows, self.draft_capacity)
            self.generation = replace(others, cache=self.cache)
        self.generation.part(row, row + 1).copy_(one)

    @torch.inference_mode()
    def enlarge(self, generation: Generation, rows: int, capacity: int, draft_capacity: int) -> None:
        """Move the rows of a generation to larger tensors; what was captured is void."""
        self.rows, self.capacity, self.draft_capacity = rows, capacity, draft_capacity
        self.cache = generation.cache.room_for(rows, capacity)
        others = replace(generation, cache=None).room_for(rows, draft_capacity)
        self.generation = replace(others, cache=self.cache)
        self.generation.copy_(generation)
        self.steps = self._target.new_steps()


@dataclass
class _Answer:
    """What the host knows of one row of a generation."""

    row: int
    """Its place among the prompts."""
    stop: Stop
    committed: int
    """Tokens in the target's cache."""
    behind: int = 0
    """How many more these are than what the draft has read, as it counts it."""
    new: int = 0
    """Tokens of the answer so far."""
    ended: bool = False

    def take(self, tokens: list[int], accepted: int) -> Round:
        """A round's tokens: those accepted, and the next root."""
        tokens, self.ended = self.stop.cut(tokens, self.new)
        self.new += len(tokens)
        return Round(tokens, accepted)


Prompts = Sequence[tuple[torch.Tensor, Mapping]]
"""For each row input_ids (1, L) without padding and the processor's other outputs."""


class Decoder(ABC):
    """The loop that both ways of decoding share.

    Args:
        target, sampling: what names the tokens, and how.
    """

    reach: int
    """Slots that a step may need behind the committed ones, in the target's cache or in what the draft remembers."""

    def __init__(self, target: Target, sampling: Sampling):
        self.target, self.sampling = target, sampling
        self._bucket = BUCKET if target.can_capture else 1
        # where steps are captured, one seat waits for the next generation: its graphs know its tensors only
        self._idle: deque[_Seat] = deque(maxlen=1)

    def rounds(self, input_ids: torch.Tensor, inputs: Mapping, stop: Stop) -> Iterator[Round]:
        """Answer one prompt; `input_ids` (1, L), `inputs` the processor's other outputs."""
        for step in self.batch_rounds([(input_ids, inputs)], [stop]):
            yield step[0]

    def batch_rounds(self, prompts: Prompts, stops: Sequence[Stop]) -> Iterator[dict[int, Round]]:
        """Answer several prompts at once; each item has the rows, counted as in `prompts`, that had not ended yet."""
        seat = self._take_seat(prompts, stops)
        try:
            yield from self._rounds(seat, prompts, stops)
        finally:
            if self.target.can_capture:
                self._idle.append(seat)

    def _rounds(self, seat: _Seat, prompts: Prompts, stops: Sequence[Stop]) -> Iterator[dict[int, Round]]:
        answers, step = self._read(seat, prompts, stops)
        yield step
        generation = self._rows(seat, answers)
        while answers:
            self._set_bounds(generation, answers)
            key = "verify", len(answers), generation.cache.used
            seat.steps.run(key, partial(self._verify, generation), partial(self._set_bounds, generation, answers))
            # the only transfer of a round from the device
            outcome = self._outcome(generation).tolist()
            step = {}
            for answer, (accepted, *named) in zip(answers, outcome, strict=True):
                step[answer.row] = answer.take(named[: accepted + 1], accepted)
                answer.committed += accepted + 1
            self._set_bounds(generation, answers)
            generation = _drop_ended(generation, answers)
            if answers:
                self._set_bounds(generation, answers)  # those that ended may have been the longest
                if not seat.has(len(answers), *self._needed(answers)):
                    generation = self._enlarged(seat, generation, answers)
                self._prepare(seat, generation, answers)
            yield step

    @torch.inference_mode()
    def _take_seat(self, prompts: Prompts, stops: Sequence[Stop]) -> _Seat:
        """A seat with room for the prompts and the beginning of their answers; a waiting one if it is large enough."""
        rows = len(prompts)
        ahead = [min(stop.max_new_tokens, CAPACITY_AHEAD) for stop in stops]
        longest = max(ids.shape[1] + new for (ids, _), new in zip(prompts, ahead, strict=True))
        drafted = max(held + new for held, new in zip(self._held(prompts), ahead, strict=True))
        capacities = self._rounded(longest) + self.reach, self._rounded(drafted) + self.reach
        try:
            seat = self._idle.pop()
        except IndexError:
            return _Seat(self.target, rows, *capacities)
        if seat.generation is None or not seat.has(rows, *capacities):
            sizes = map(max, (rows, *capacities), (seat.rows, seat.capacity, seat.draft_capacity))
            del seat  # its memory may be needed
            return _Seat(self.target, *sizes)
        seat.generation.zero_()
        return seat

    def _read(self, seat: _Seat, prompts: Prompts, stops: Sequence[Stop]) -> tuple[list[_Answer], dict[int, Round]]:
        """Read all prompts; answers that end with their first token do not become a row of the generation."""
        answers, step = [], {}
        for row, ((input_ids, inputs), stop) in enumerate(zip(prompts, stops, strict=True)):
            one, prompt = self._read_prompt(seat, len(answers), input_ids, inputs)
            answer = _Answer(row, stop, committed=input_ids.shape[1])
            step[row] = answer.take(one.root.tolist(), 0)
            if not answer.ended:
                answer.behind = self._begin(seat, len(answers), one, prompt)
                answers.append(answer)
        return answers, step

    @torch.inference_mode()
    def _read_prompt(
        self, seat: _Seat, place: int, input_ids: torch.Tensor, inputs: Mapping
    ) -> tuple[Generation, Prompt]:
        cache = seat.cache.part(place, place + 1)
        cache.lengths.zero_()  # an answer that ended with its first token may have been there
        prompt = self.target.prefill(cache, input_ids, inputs)
        with seat.steps.alone:
            root = self.sampling.choose(prompt.logits)
        return Generation(cache, prompt.rope_delta, root), prompt

    def _rows(self, seat: _Seat, answers: list[_Answer]) -> Generation | None:
        return seat.generation and seat.generation.part(0, len(answers))

    def _enlarged(self, seat: _Seat, generation: Generation, answers: list[_Answer]) -> Generation:
        left = self._rounded(max(answer.stop.max_new_tokens - answer.new for answer in answers))
        present = seat.capacity, seat.draft_capacity
        room = (max(now, min(2 * now, n + left)) for now, n in zip(present, self._needed(answers), strict=True))
        seat.enlarge(generation, len(answers), *room)
        generation = self._rows(seat, answers)
        self._set_bounds(generation, answers)
        return generation

    def _needed(self, answers: list[_Answer]) -> tuple[int, int]:
        """Slots of a row that the next steps may need, in the target's cache and in what the draft remembers."""
        return self._bound(answers) + self.reach, self._bound(answers, of_draft=True) + self.reach

    def _held(self, prompts: Prompts) -> list[int]:
        """How many places each prompt takes in what the draft remembers."""
        return [ids.shape[1] for ids, _ in prompts]

    def _bound(self, answers: Iterable[_Answer], of_draft: bool = False) -> int:
        """Bound of the tokens in the target's cache, for any row, or of what the draft has read."""
        return self._rounded(max(answer.committed - answer.behind * of_draft for answer in answers))

    def _rounded(self, length: int) -> int:
        return -(-length // self._bucket) * self._bucket

    def _set_bounds(self, generation: Generation, answers: list[_Answer]) -> None:
        generation.cache.used = self._bound(answers)

    def _begin(self, seat: _Seat, place: int, one: Generation, prompt: Prompt) -> int:
        """Take a row's place with what is known after its prompt; returns how far the draft is behind the target."""
        seat.place(place, one)
        return 0

    @abstractmethod
    def _verify(self, generation: Generation) -> None:
        """A round of the target."""

    @abstractmethod
    def _outcome(self, generation: Generation) -> torch.Tensor:
        """(B, 1 + n): how many drafted tokens were accepted, then these and the next root."""

    @abstractmethod
    def _prepare(self, seat: _Seat, generation: Generation, answers: list[_Answer]) -> None:
        """What the next round needs that is not there yet."""


class SpeculativeDecoder(Decoder):
    """Draft a tree, verify it in one pass of the target, keep one path (paper, section 3.1)."""

    def __init__(
        self,
        target: Target,
        draft: BaseHead | PromptLookup,
        shape: TreeShape,
        sampling: Sampling,
        output: DraftOutput | None = None,
    ):
        super().__init__(target, sampling)
        self.draft = draft
        self.output = output or DraftOutput(target.logits)
        self.shape = shape = draft.fit(shape)
        # a lookup's text is one token ahead of the target's cache
        self.reach = 1 + max(shape.total_token, draft.reach(shape))

    def _held(self, prompts: Prompts) -> list[int]:
        """Images that the draft compresses take fewer places than tokens."""
        return [self.draft.held(ids.shape[1], image_spans(self.target.model, ids, rest)[0]) for ids, rest in prompts]

    def _set_bounds(self, generation: Generation, answers: list[_Answer]) -> None:
        super()._set_bounds(generation, answers)
        generation.drafted.state.used = self._bound(answers, of_draft=True)

    @torch.inference_mode()
    def _begin(self, seat: _Seat, place: int, one: Generation, prompt: Prompt) -> int:
        state = self.draft.start(prompt, one.root, seat.draft_capacity)
        behind = prompt.hidden.shape[1] - state.used
        features = prompt.hidden.new_zeros(1, self.shape.levels + 1, prompt.hidden.shape[2])
        outcome = one.root.new_zeros(1, self.shape.levels + 2)
        seat.place(place, replace(one, drafted=Drafted(state, self._grow(state, one.root), outcome, features)))
        return behind

    @torch.inference_mode()
    def _verify(self, generation: Generation) -> None:
        """The target's pass over the tree; its cache keeps the path that was accepted."""
        drafted, cache = generation.drafted, generation.cache
        tree = drafted.tree
        tokens = tree.tokens.clamp(min=0)  # empty nodes go along as any token, nobody reads what they say
        hidden = self.target.forward(cache, tokens, generation.positions(tree.depths), tree.mask)
        accepted = accept(tree, self.sampling.choose(self.target.logits(hidden)))
        cache.keep(accepted.path)
        cache.commit(accepted.count + 1)
        drafted.outcome.copy_(torch.cat([accepted.count[:, None], accepted.tokens], dim=1))
        drafted.features.copy_(hidden.gather(1, accepted.path[..., None].expand(-1, -1, hidden.shape[2])))
        generation.root.copy_(accepted.root)

    def _outcome(self, generation: Generation) -> torch.Tensor:
        return generation.drafted.outcome

    def _prepare(self, seat: _Seat, generation: Generation, answers: list[_Answer]) -> None:
        key = "advance", len(generation.root), generation.drafted.state.used
        seat.steps.run(key, partial(self._advance, generation), partial(self._set_bounds, generation, answers))

    @torch.inference_mode()
    def _advance(self, generation: Generation) -> None:
        """The draft reads the kept path and grows the next tree."""
        drafted = generation.drafted
        counts, tokens = drafted.outcome[:, 0] + 1, drafted.outcome[:, 1:]
        self.draft.extend(drafted.state, drafted.features, tokens, counts)
        drafted.tree.copy_(self._grow(drafted.state, generation.root))

    def _grow(self, state, root: torch.Tensor) -> Tree:
        return self.draft.grow(state, root, self.shape, *self.output)


class BaselineDecoder(Decoder):
    """Plain autoregressive decoding: one token a pass."""

    reach = 1

    @torch.inference_mode()
    def _verify(self, generation: Generation) -> None:
        """A pass over the newest token; its cache is exact, and needs no mask, for one row of the true length."""
        cache, root = generation.cache, generation.root
        exact = self._bucket == 1 and len(root) == 1
        itself = None if exact else torch.ones_like(root, dtype=torch.bool)[:, None, None]
        depths = torch.zeros_like(root)[:, None]
        hidden = self.target.forward(cache, root[:, None], generation.positions(depths), itself)
        cache.commit(torch.ones_like(root))
        root.copy_(self.sampling.choose(self.target.logits(hidden[:, 0])))

    def _outcome(self, generation: Generation) -> torch.Tensor:
        return F.pad(generation.root[:, None], (1, 0))

    def _prepare(self, seat: _Seat, generation: Generation, answers: list[_Answer]) -> None:
        """Nothing: the next pass is over the token that this one chose."""


@torch.inference_mode()
def _drop_ended(generation: Generation, answers: list[_Answer]) -> Generation:
    """The generation without the rows that have ended, which leave `answers` too: the last one takes their place."""
    for place in reversed(range(len(answers))):
        if answers[place].ended:
            last = len(answers) - 1
            if place != last:
                generation.part(place, place + 1).copy_(generation.part(last, last + 1))
            answers[place] = answers[last]
            answers.pop()
            generation = generation.part(0, last)
    return generation
