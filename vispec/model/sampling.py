"""Which drafted tokens the target would have said itself.

The target names one token at every node of the tree: the most likely one when decoding greedily, one drawn from its
warped distribution when sampling. Walking down from the root along the named tokens for as long as they were drafted is
the lossless acceptance rule: the candidates were chosen deterministically, so trying a node's children one by one with
their residual probabilities (EAGLE-2, algorithm 1) accepts child c with probability p(c), and drawing the token first
and then looking for it among the children does the same. What the target named at the last kept node is the next root,
whether its node had children or not.
"""

from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vispec.model.tree import Tree

GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How the target's tokens are chosen: temperature up to 1e-5 is greedy, top_p and top_k of 0 are off."""

    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:  # nor nan
            raise ValueError(f"temperature must not be negative, found {self.temperature}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be between 0 and 1, found {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, found {self.top_k}")

    @property
    def greedy(self) -> bool:
        return self.temperature <= GREEDY_BELOW

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Warped distribution (…, V) of logits (…, V), by transformers' warpers in the order of its generate()."""
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(int(self.top_k)))
        if 0 < self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        flat = logits.float().reshape(-1, logits.shape[-1])
        return warpers(None, flat).softmax(-1).view(logits.shape)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The target's token for each row of logits: (…, V) -> (…)."""
        if self.greedy:
            # the first of equal ones, as by argmax, which takes four times as long in bfloat16 on a CPU
            return logits.max(-1).indices
        probabilities = self.probabilities(logits)
        # what torch.multinomial does, without its checks, which wait for the device
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


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
