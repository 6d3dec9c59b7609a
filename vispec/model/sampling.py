"""Which drafted tokens the target would have said itself.

The target names one token at every node of the tree: the most likely one when decoding greedily, one drawn from its
warped distribution when sampling. Walking down from the root along the named tokens for as long as they were drafted is
the lossless acceptance rule: the candidates were chosen deterministically, so trying a node's children one by one with
their residual probabilities (EAGLE-2, algorithm 1) accepts child c with probability p(c), and drawing the token first
and then looking for it among the children does the same. What the target named at the last kept node is the next root,
whether its node had children or not.

A token is drawn as argmax(probabilities / noise) with exponential noise. The noise depends on the row's seed and the
position in the answer alone, so it is the same for all nodes of a depth; only one of them can be on the path, hence the
rule stays exact. A seed therefore gives the same text with any tree, without one, and beside any other rows.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vispec.model.arguments import number, whole
from vispec.model.rows import Answer
from vispec.model.tree import Tree

GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How the target's tokens are chosen: temperature up to 1e-5 is greedy, top_p and top_k of 0 are off."""

    temperature: float = 0.0
    top_p: float = 0.0
    top_k: float = 0

    def __post_init__(self):
        number("temperature", self.temperature), number("top_p", self.top_p)
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, found {self.temperature}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be between 0 and 1, found {self.top_p}")
        if whole("top_k", self.top_k) < 0:
            raise ValueError(f"top_k must not be negative, found {self.top_k}")

    @property
    def greedy(self) -> bool:
        return self.temperature <= GREEDY_BELOW

    @property
    def warpers(self) -> LogitsProcessorList:
        """Transformers' own, in the order of its generate()."""
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(int(self.top_k)))
        if 0 < self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers

    @property
    def options(self) -> dict:
        """The same as arguments of generate(), which leave what is off to the target's generation config."""
        if self.greedy:
            return {"do_sample": False}
        given = {"top_p": self.top_p, "top_k": int(self.top_k)}
        return {"do_sample": True, "temperature": self.temperature} | {k: v for k, v in given.items() if v}

    def choice(self, rows: int) -> "Choice":
        """For a generation of so many rows; when sampling, their seeds come from torch's default generator."""
        return Choice() if self.greedy else Choice(self.warpers, row_seeds(None, rows))


class Choice:
    """How the target's tokens of one generation are chosen: greedily, or by drawing from the warped distribution.

    Args:
        warpers: what is applied to the logits first; they do not look at the text.
        seeds: of each row of the generation; None: greedily.
    """

    def __init__(self, warpers: Sequence = (), seeds: Sequence[int] | None = None):
        self.warpers = LogitsProcessorList(warpers)
        self.seeds = seeds
        self._generator: torch.Generator | None = None

    def choose(self, logits: torch.Tensor, answers: Sequence[Answer], tree: Tree | None = None) -> torch.Tensor:
        """The target's token at every node: (B, N).

        Args:
            logits: (B, N, V).
            answers: of these B rows, before this round.
            tree: whose N nodes these are; None: N = 1, the root alone.
        """
        scores = self.scores(logits) if self.warpers else logits
        if self.seeds is None:
            # the first of equal ones, as by argmax, which takes four times as long in bfloat16 on a CPU
            return scores.max(-1).indices
        noise = self.noise(answers, range(1 if tree is None else tree.paths.shape[2]), scores)
        if tree is not None:
            noise = noise.gather(1, tree.depths[..., None].expand_as(scores))
        return draw(scores, noise)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Warped logits (…, V) of logits (…, V)."""
        return self.warpers(None, logits.float().reshape(-1, logits.shape[-1])).view(logits.shape)

    def noise(self, answers: Sequence[Answer], depths: Iterable[int], like: torch.Tensor) -> torch.Tensor:
        """(B, depths, V) exponential noise for the choices at these depths below the answers' newest tokens."""
        depths = tuple(depths)
        noise = torch.empty(len(answers), len(depths), like.shape[-1], device=like.device)
        if self._generator is None:
            self._generator = torch.Generator(like.device)
        for own, answer in zip(noise, answers, strict=True):
            for vector, depth in zip(own, depths, strict=True):
                self._generator.manual_seed(_mixed(self.seeds[answer.row], answer.new + depth))
                vector.exponential_(generator=self._generator)
        return noise


def draw(scores: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Tokens (…) drawn from softmax(scores (…, V)): what torch.multinomial does, without checks that wait for the
    device."""
    return (scores.float().softmax(-1) / noise).argmax(-1)


def row_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """A seed for each row: a list as it is, counted up from one seed, or drawn from torch's default generator.

    Raises:
        TypeError, ValueError: that is no seed, or the list has another length.
    """
    if seed is None:
        return torch.randint(2**62, (rows,)).tolist()
    if isinstance(seed, int) and not isinstance(seed, bool):
        return [seed + row for row in range(rows)]
    if not isinstance(seed, Sequence) or not all(isinstance(one, int) and not isinstance(one, bool) for one in seed):
        raise TypeError(f"seed must be an int or a list of ints, found {seed!r}")
    if len(seed) != rows:
        raise ValueError(f"seed has {len(seed)} entries, expected one for each of the {rows} rows")
    return list(seed)


def _mixed(seed: int, position: int) -> int:
    """A seed for one position, far from those of its neighbours."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass
class Accepted:
    """The outcome of verification."""

    count: torch.Tensor
    """(B,) draft tokens accepted."""
    path: torch.Tensor
    """(B, D + 1) kept nodes, root first; surplus columns repeat the last one."""
    tokens: torch.Tensor
    """(B, D + 1) the token after each kept node: accepted tokens, then the next root, then surplus."""
    root: torch.Tensor
    """(B,) the next root."""


def accept(tree: Tree, chosen: torch.Tensor) -> Accepted:
    """Keep the longest path whose tokens the target named.

    Args:
        tree: N nodes.
        chosen: (B, N) the target's token at every node.
    """
    # the root was named by the last round; any other node was named if its parent's token is its own
    named = chosen.gather(1, tree.parents) == tree.tokens
    named[:, :1].fill_(True)
    kept = (named[:, None, :] | ~tree.mask).all(-1)
    # children of one node differ in their tokens, so the kept nodes form a single path: its deepest node ends it
    last = tree.depths.masked_fill(~kept, -1).argmax(-1, keepdim=True)
    path = tree.paths.gather(1, last[..., None].expand(-1, 1, tree.paths.shape[2]))[:, 0]
    count = tree.depths.gather(1, last)[:, 0]
    return Accepted(count, path, chosen.gather(1, path), chosen.gather(1, last)[:, 0])
