"""The decoding loops: tree speculative decoding, and the plain baseline over the same machinery.

Both are iterators over rounds. The first item is the token that the prompt's own pass gives; each further item is one
round: the tokens it added and how many of them had been drafted. All that a generation remembers lives in the iterator,
so closing it leaves nothing behind, and any number of generations can run side by side on one model.

Prompts of a batch are read one by one, without padding, and then decoded together. A row whose answer has ended leaves
the batch: the last row takes its place.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from vispec.model.acceptance import Sampling, accept
from vispec.model.cache import TreeCache
from vispec.model.draft import BaseHead, DraftState
from vispec.model.draft_vocab import DraftOutput
from vispec.model.lookup import LookupState, PromptLookup
from vispec.model.medusa import MedusaState
from vispec.model.rows import Rows
from vispec.model.target import Prompt, Target
from vispec.model.tree import Tree, TreeShape

CAPACITY_AHEAD = 512
"""Slots a target cache has for new tokens before it grows."""


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
class KeptPath(Rows):
    """What verification kept and the draft has not read yet: D + 1 tokens a row, of which some are surplus."""

    hidden: torch.Tensor
    """(B, D + 1, H) the target's features of the root and the kept nodes."""
    tokens: torch.Tensor
    """(B, D + 1) the token after each of them."""
    counts: torch.Tensor
    """(B,) how many of them are real."""


@dataclass
class Generation(Rows):
    """What lasts from round to round on the device; B rows."""

    cache: TreeCache
    rope_delta: torch.Tensor | None
    root: torch.Tensor
    """(B,) the newest token, whose key is not in the cache yet."""
    draft: DraftState | MedusaState | LookupState | None = None
    tree: Tree | None = None
    path: KeptPath | None = None

    def positions(self, depths: torch.Tensor) -> torch.Tensor:
        """(B, n) target positions of tokens at these depths under the root."""
        positions = self.cache.lengths[:, None] + depths
        return positions if self.rope_delta is None else positions + self.rope_delta


@dataclass
class _Answer:
    """What the host knows of one row of a generation."""

    row: int
    """Its place among the prompts."""
    stop: Stop
    committed: int
    """Tokens in the target's cache."""
    read: int = 0
    """What the draft has read, as it counts it."""
    new: int = 0
    """Tokens of the answer so far."""
    ended: bool = False

    def take(self, tokens: list[int], accepted: int) -> Round:
        """A round's tokens: those accepted, and the next root."""
        tokens, self.ended = self.stop.cut(tokens, self.new)
        self.new += len(tokens)
        return Round(tokens, accepted)

    def grow(self, count: int) -> None:
        self.committed += count
        self.read += count


Prompts = Sequence[tuple[torch.Tensor, Mapping]]
"""For each row input_ids (1, L) without padding and the processor's other outputs."""


class Decoder:
    """The loop that both ways of decoding share."""

    def __init__(self, target: Target, sampling: Sampling):
        self.target, self.sampling = target, sampling

    def rounds(self, input_ids: torch.Tensor, inputs: Mapping, stop: Stop) -> Iterator[Round]:
        """Answer one prompt; `input_ids` (1, L), `inputs` the processor's other outputs."""
        for step in self.batch_rounds([(input_ids, inputs)], [stop]):
            yield step[0]

    def batch_rounds(self, prompts: Prompts, stops: Sequence[Stop]) -> Iterator[dict[int, Round]]:
        """Answer several prompts at once; each item has the rows, counted as in `prompts`, that had not ended yet."""
        generation, answers, step = self._read(prompts, stops)
        yield step
        while answers:
            # the only transfer of a round from the device
            outcome = self._verify(generation).tolist()
            step = {}
            for answer, (accepted, *named) in zip(answers, outcome, strict=True):
                step[answer.row] = answer.take(named[: accepted + 1], accepted)
                answer.grow(accepted + 1)
            generation = _drop_ended(generation, answers)
            if answers:
                generation.cache.used = max(answer.committed for answer in answers)
                self._advance(generation, answers)
            yield step

    def _read(
        self, prompts: Prompts, stops: Sequence[Stop]
    ) -> tuple[Generation | None, list[_Answer], dict[int, Round]]:
        """Read all prompts; answers that end with their first token do not become a row of the generation."""
        capacity = max(ids.shape[1] for ids, _ in prompts) + CAPACITY_AHEAD
        generation, answers, step = None, [], {}
        for row, ((input_ids, inputs), stop) in enumerate(zip(prompts, stops, strict=True)):
            one, prompt = self._read_prompt(input_ids, inputs, capacity if len(prompts) == 1 else input_ids.shape[1])
            answer = _Answer(row, stop, committed=input_ids.shape[1])
            step[row] = answer.take(one.root.tolist(), 0)
            if answer.ended:
                continue
            self._begin(one, prompt, answer)
            del prompt
            generation = _joined(generation, one, len(answers), len(prompts), capacity)
            answers.append(answer)
        if answers:
            generation = generation.part(0, len(answers))
            generation.cache.used = max(answer.committed for answer in answers)
            self._ready(generation, answers)
        return generation, answers, step

    @torch.inference_mode()
    def _read_prompt(self, input_ids: torch.Tensor, inputs: Mapping, capacity: int) -> tuple[Generation, Prompt]:
        cache = self.target.new_cache(1, capacity)
        prompt = self.target.prefill(cache, input_ids, inputs)
        return Generation(cache, prompt.rope_delta, root=self.sampling.choose(prompt.logits)), prompt

    def _begin(self, generation: Generation, prompt: Prompt, answer: _Answer) -> None:
        """What else is remembered of one prompt."""

    def _ready(self, generation: Generation, answers: list[_Answer]) -> None:
        """Prepare the first round of the whole batch."""

    def _verify(self, generation: Generation) -> torch.Tensor:
        """A round of the target: (B, 1 + n) with the number of accepted tokens of each row, then its new tokens."""
        raise NotImplementedError

    def _advance(self, generation: Generation, answers: list[_Answer]) -> None:
        """Prepare the next round."""


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
        self.shape = draft.fit(shape)

    @torch.inference_mode()
    def _begin(self, generation: Generation, prompt: Prompt, answer: _Answer) -> None:
        generation.draft = self.draft.start(prompt, generation.root)
        answer.read = generation.draft.used

    @torch.inference_mode()
    def _ready(self, generation: Generation, answers: list[_Answer]) -> None:
        generation.draft.used = max(answer.read for answer in answers)
        self._grow(generation)

    @torch.inference_mode()
    def _verify(self, generation: Generation) -> torch.Tensor:
        """The target's pass over the tree; its cache keeps the path that was accepted."""
        tree, cache = generation.tree, generation.cache
        tokens = tree.tokens.clamp(min=0)  # empty nodes go along as any token, nobody reads what they say
        hidden = self.target.forward(cache, tokens, generation.positions(tree.depths), tree.mask)
        accepted = accept(tree, self.sampling.choose(self.target.logits(hidden)))
        counts = accepted.count + 1
        cache.keep(accepted.path)
        cache.commit(counts)
        features = hidden.gather(1, accepted.path[..., None].expand(-1, -1, hidden.shape[2]))
        generation.path = KeptPath(features, accepted.tokens, counts)
        generation.root = accepted.root
        return torch.cat([accepted.count[:, None], accepted.tokens], dim=1)

    @torch.inference_mode()
    def _advance(self, generation: Generation, answers: list[_Answer]) -> None:
        """The draft reads the kept path and grows the next tree."""
        path = generation.path
        self.draft.extend(generation.draft, path.hidden, path.tokens, path.counts)
        self._ready(generation, answers)

    def _grow(self, generation: Generation) -> None:
        generation.tree = self.draft.grow(generation.draft, generation.root, self.shape, *self.output)


class BaselineDecoder(Decoder):
    """Plain autoregressive decoding: one token a pass."""

    @torch.inference_mode()
    def _verify(self, generation: Generation) -> torch.Tensor:
        cache, root = generation.cache, generation.root
        itself = None if len(root) == 1 else torch.ones_like(root, dtype=torch.bool)[:, None, None]
        depths = torch.zeros_like(root)[:, None]
        hidden = self.target.forward(cache, root[:, None], generation.positions(depths), itself)
        cache.commit(torch.ones_like(root))
        generation.root = self.sampling.choose(self.target.logits(hidden[:, 0]))
        return torch.stack([torch.zeros_like(generation.root), generation.root], dim=1)


@torch.inference_mode()
def _joined(generation: Generation | None, one: Generation, place: int, rows: int, capacity: int) -> Generation:
    """A generation for as many rows, the one at `place` being that of `one`."""
    if rows == 1:
        return one
    if generation is None:
        generation = one.room_for(rows, capacity)
    generation.part(place, place + 1).copy_(one)
    return generation


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
