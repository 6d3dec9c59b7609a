"""The decoding loops: tree speculative decoding, and the plain baseline over the same machinery.

Both are iterators over rounds. The first item is the token that the prompt's own pass gives; each further item is one
round: the tokens it added and how many of them had been drafted. All that a generation remembers lives in the iterator,
so closing it leaves nothing behind, and any number of generations can run side by side on one model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from vispec.model.acceptance import Accepted, Sampling, accept
from vispec.model.cache import TreeCache
from vispec.model.draft import BaseHead, DraftState
from vispec.model.draft_vocab import DraftOutput
from vispec.model.lookup import LookupState, PromptLookup
from vispec.model.medusa import MedusaState
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
class _Generation:
    """One prompt being answered: everything that lasts from round to round."""

    cache: TreeCache
    rope_delta: torch.Tensor | None
    root: torch.Tensor
    """(B,) the newest token, whose key is not in the cache yet."""
    draft: DraftState | MedusaState | LookupState | None = None
    tree: Tree | None = None

    def positions(self, depths: torch.Tensor) -> torch.Tensor:
        """(B, n) target positions of tokens at these depths under the root."""
        positions = self.cache.lengths[:, None] + depths
        return positions if self.rope_delta is None else positions + self.rope_delta


class SpeculativeDecoder:
    """Draft a tree, verify it in one pass of the target, keep one path (paper, section 3.1)."""

    def __init__(
        self,
        target: Target,
        draft: BaseHead | PromptLookup,
        shape: TreeShape,
        sampling: Sampling,
        output: DraftOutput | None = None,
    ):
        self.target, self.draft, self.sampling = target, draft, sampling
        self.output = output or DraftOutput(target.logits)
        self.shape = draft.fit(shape)

    def rounds(self, input_ids: torch.Tensor, inputs: Mapping, stop: Stop) -> Iterator[Round]:
        """Answer one prompt; `input_ids` (1, L), `inputs` the processor's other outputs."""
        generation, prompt = _read_prompt(self.target, input_ids, inputs, self.sampling)
        tokens, done = stop.cut(generation.root.tolist(), 0)
        if not done:
            self._begin(generation, prompt)
        del prompt
        yield Round(tokens, 0)
        count = len(tokens)
        while not done:
            hidden, accepted = self._verify(generation)
            # the only transfer of a round from the device
            ((drafted, *named),) = torch.cat([accepted.count[:, None], accepted.tokens], dim=1).tolist()
            tokens, done = stop.cut(named[: drafted + 1], count)
            count += len(tokens)
            if not done:
                self._advance(generation, hidden, accepted, longest=drafted)
            yield Round(tokens, drafted)

    @torch.inference_mode()
    def _begin(self, generation: _Generation, prompt: Prompt) -> None:
        generation.draft = self.draft.start(prompt, generation.root)
        self._grow(generation)

    @torch.inference_mode()
    def _verify(self, generation: _Generation) -> tuple[torch.Tensor, Accepted]:
        """The target's pass over the tree: features (B, N, H) of its nodes, and what is kept of it."""
        tree = generation.tree
        tokens = tree.tokens.clamp(min=0)  # empty nodes go along as any token, nobody reads what they say
        hidden = self.target.forward(generation.cache, tokens, generation.positions(tree.depths), tree.mask)
        accepted = accept(tree, self.sampling.choose(self.target.logits(hidden)))
        return hidden, accepted

    @torch.inference_mode()
    def _advance(self, generation: _Generation, hidden: torch.Tensor, accepted: Accepted, longest: int) -> None:
        """Commit the kept path in both caches and draft the next tree; `longest` is the batch's largest count."""
        cache = generation.cache
        kept = accepted.count + 1
        cache.keep(accepted.path)
        cache.commit(kept, used=cache.used + longest + 1)
        features = hidden.gather(1, accepted.path[..., None].expand(-1, -1, hidden.shape[2]))
        self.draft.extend(generation.draft, features, accepted.tokens, kept, longest + 1)
        generation.root = accepted.root
        self._grow(generation)

    def _grow(self, generation: _Generation) -> None:
        generation.tree = self.draft.grow(generation.draft, generation.root, self.shape, *self.output)


class BaselineDecoder:
    """Plain autoregressive decoding: one token a pass."""

    def __init__(self, target: Target, sampling: Sampling):
        self.target, self.sampling = target, sampling

    def rounds(self, input_ids: torch.Tensor, inputs: Mapping, stop: Stop) -> Iterator[Round]:
        """Answer one prompt; `input_ids` (1, L), `inputs` the processor's other outputs."""
        generation, _ = _read_prompt(self.target, input_ids, inputs, self.sampling)
        tokens, done = stop.cut(generation.root.tolist(), 0)
        yield Round(tokens, 0)
        count = len(tokens)
        while not done:
            self._step(generation)
            tokens, done = stop.cut(generation.root.tolist(), count)
            count += len(tokens)
            yield Round(tokens, 0)

    @torch.inference_mode()
    def _step(self, generation: _Generation) -> None:
        cache, root = generation.cache, generation.root
        hidden = self.target.forward(cache, root[:, None], generation.positions(torch.zeros_like(root)[:, None]))
        cache.commit(torch.ones_like(root), used=cache.used + 1)
        generation.root = self.sampling.choose(self.target.logits(hidden[:, 0]))


@torch.inference_mode()
def _read_prompt(
    target: Target, input_ids: torch.Tensor, inputs: Mapping, sampling: Sampling
) -> tuple[_Generation, Prompt]:
    cache = target.new_cache(input_ids.shape[0], input_ids.shape[1] + CAPACITY_AHEAD)
    prompt = target.prefill(cache, input_ids, inputs)
    return _Generation(cache, prompt.rope_delta, root=sampling.choose(prompt.logits)), prompt
