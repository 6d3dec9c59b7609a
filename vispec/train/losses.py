"""Losses over scored pairs, without ever holding the logits of all of them.

Shapes: S scored rows, M steps of the chain, H hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

RANKED = 10
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
"""Logits held at a time: what the CPU's cache takes, what a GPU computes efficiently."""
LEAST_OUTPUTS = 256
"""Outputs computed at a time at least, however large the vocabulary: each chunk reads the whole output head."""

PARTS = ("loss", "feature", "token", "ranking", "top1", "top2", "top3")
"""What is summed over rows beside the loss."""


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses of a draft output against the target's feature of the same token.

    Attributes:
        feature_weight: of the smooth-L1 distance of the two features, mean over H.
        token_weight: of everything below.
        token_loss: "ce" is the cross-entropy of the draft's token distribution against the target's; "l1" ten times
            the distance of the two distributions, summed over the vocabulary.
        ranking_weight: of the list-wise ranking loss, which wants the target's ten best tokens in the target's order.
    """

    feature_weight: float
    token_weight: float
    token_loss: str
    ranking_weight: float

    @classmethod
    def stage1(cls, token_weight: float = 0.1) -> "Objective":
        return cls(1.0, token_weight, "ce", 0.1)

    @classmethod
    def eagle(cls, token_weight: float = 0.1) -> "Objective":
        """Of EAGLE, and of those that train as it does."""
        return cls(1.0, token_weight, "ce", 0.0)

    @classmethod
    def stage2(cls, token_loss: str = "l1", token_weight: float = 1.0) -> "Objective":
        """As released (l1, with ranking), or as the paper has it (cross-entropy alone)."""
        return cls(0.0, token_weight, token_loss, 0.1 if token_loss == "l1" else 0.0)

    def rows(self, outs: torch.Tensor, targets: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Sums over some rows: (len(PARTS),), the loss first. outs (S, M, H), targets (S, H), head (V, H)."""
        with torch.no_grad():
            target_logits = F.linear(targets.to(head.dtype), head).float()
            ranked = target_logits.topk(min(RANKED, head.shape[0])).indices[:, None].expand(-1, outs.shape[1], -1)
            expected = target_logits.softmax(-1)[:, None]
        logits = F.linear(outs.to(head.dtype), head).float()
        if self.token_loss == "ce":
            token = -(expected * logits.log_softmax(-1)).sum()
        else:
            token = 10.0 * (logits.softmax(-1) - expected).abs().sum()
        total = token
        ranking = outs.new_zeros((), dtype=torch.float32)
        if self.ranking_weight:
            scores = logits.gather(-1, ranked)
            ranking = (scores.flip(-1).logcumsumexp(-1) - scores.flip(-1)).sum()
            total = total + self.ranking_weight * ranking
        feature = outs.new_zeros((), dtype=torch.float32)
        total = self.token_weight * total
        if self.feature_weight:
            difference = F.smooth_l1_loss(outs.float(), targets[:, None].expand_as(outs).float(), reduction="sum")
            feature = difference / outs.shape[2]
            total = total + self.feature_weight * feature
        with torch.no_grad():
            first = logits[:, 0]
            rank = (first > first.gather(1, ranked[:, 0, :1])).sum(1)
            hits = [(rank < k).sum().float() for k in (1, 2, 3)]
        return torch.stack([total, feature.detach(), token.detach(), ranking.detach(), *hits])


def chunk_rows(device: str, vocabulary: int, steps: int) -> int:
    """Rows computed at a time on a type of device, each of them `steps` outputs."""
    return max(1, max(LEAST_OUTPUTS, CHUNK_ELEMENTS.get(device, 2**25) // vocabulary) // steps)


def summed_loss(
    objective: Objective, outs: torch.Tensor, targets: torch.Tensor, head: torch.Tensor, chunk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over rows and steps, and the sums of its parts.

    Args:
        outs: (S, M, H) outputs of the draft head at the scored pairs, for each step of the chain.
        targets: (S, H).
        head: (V, H) the target's output head.
        chunk: rows computed at a time; by the device when None.

    Returns:
        loss, a scalar with gradient, and the detached parts by PARTS, (len(PARTS),).
    """
    if chunk is None:
        chunk = chunk_rows(outs.device.type, head.shape[0], outs.shape[1])
    parts = _Chunked.apply(outs, objective, targets, head, chunk)
    return parts[0], parts.detach()


class _Chunked(torch.autograd.Function):
    """Losses and their gradient chunk by chunk; as the head is frozen, the rows' gradient is all there is to keep."""

    @staticmethod
    def forward(ctx, outs, objective, targets, head, chunk):
        sums = outs.new_zeros(len(PARTS), dtype=torch.float32)
        gradient = torch.zeros_like(outs) if ctx.needs_input_grad[0] else None
        for start in range(0, outs.shape[0], chunk):
            part = slice(start, start + chunk)
            rows = outs[part].detach().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                values = objective.rows(rows, targets[part], head)
                if gradient is not None:
                    gradient[part] = torch.autograd.grad(values[0], rows)[0]
            sums += values.detach()
        ctx.gradient = gradient
        return sums

    @staticmethod
    def backward(ctx, grad_sums):
        return ctx.gradient * grad_sums[0], None, None, None, None
