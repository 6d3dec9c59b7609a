"""Training of EAGLE-3's head: on its own outputs for several steps, against what the target says (training-time test).

Step s drafts the token s + 1 places behind what the target has read, from the head's own outputs of the steps before:
what `drafted_in_a_row` follows, so each pair has one output of each step. Only the tokens that the head may propose are
learned, by the target's distribution among them; a pair whose token is none of them is not scored. No feature is
compared.

As published: 7 steps, each with 0.8 times the weight of the one before, and no noise. Ours: the mean is over scored
pairs and steps, as for the other heads; a new head takes its tokens from the data's answers, and the rows of its output
head from the target's.

Shapes: B samples, L tokens, S scored pairs, M steps, H hidden size, V tokens of the target, V_d of the head.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from vispec.model.drafts import Eagle3Head
from vispec.train.chain import drafted_in_a_row
from vispec.train.draft_vocab import rank_tokens
from vispec.train.losses import chunk_rows
from vispec.train.metrics import DEPTH
from vispec.train.samples import Batch
from vispec.train.trainer import Trainer

STEPS, DECAY = 7, 0.8


@torch.no_grad()
def take_vocabulary(head: Eagle3Head, lm_head: torch.Tensor, counts: torch.Tensor) -> None:
    """Give a new head the tokens that are the most frequent in answers, `counts` (V,), and their rows of (V, H)."""
    tokens = rank_tokens(counts, ())[: len(head.d2t)].sort().values
    head.d2t.copy_(tokens - torch.arange(len(tokens)))
    head.t2d[tokens] = True
    head.lm_head.weight.copy_(lm_head[tokens])


class Eagle3Trainer(Trainer):
    """Trains an EAGLE-3 head; arguments as for `Trainer`."""

    head: Eagle3Head

    def outputs(self, batch: Batch) -> torch.Tensor:
        """(S, M, H): the outputs of all steps at the scored pairs."""
        return self._rows(batch, self.recipe.mtp_steps + 1)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        reached = batch.scored[:, None] % batch.ids.shape[1] >= torch.arange(
            self.recipe.mtp_steps + 1, device=batch.scored.device
        )
        with self.processes.precision():
            loss, parts = token_loss(self.head, self.outputs(batch), batch.targets, self.lm_head, reached)
        weight = self.recipe.objective.token_weight
        return weight * loss, torch.cat([weight * parts[:1], parts[1:]])

    def drafted(self, batch: Batch) -> Iterable[torch.Tensor]:
        return self._rows(batch, DEPTH).unbind(1)

    def drafted_tokens(self, outs: torch.Tensor) -> torch.Tensor:
        chunks = outs.split(chunk_rows(outs.device.type, self.head.lm_head.out_features, 1))
        best = torch.cat([self.head.logits(chunk).argmax(-1) for chunk in chunks])
        return self.head.token_ids[best]

    def _rows(self, batch: Batch, steps: int) -> torch.Tensor:
        hidden, embeds = self.head.project(batch.hidden), batch.embeds(self._table)
        outs = drafted_in_a_row(self.head, hidden, embeds, batch.images, batch.lengths, steps)
        return torch.stack([out.flatten(0, 1)[batch.scored] for out in outs], dim=1)


def token_loss(
    head: Eagle3Head, outs: torch.Tensor, targets: torch.Tensor, lm_head: torch.Tensor, reached: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed over pairs and steps: the weighted cross-entropy with its gradient, and the parts of `losses.PARTS`.

    Args:
        outs: (S, M, H).
        targets: (S, H) the target's feature of the token after each pair.
        lm_head: (V, H) the target's.
        reached: (S, M) whether a draft of so many steps ends at the pair; in the first pairs of a text some do not.
    """
    rows = chunk_rows(outs.device.type, lm_head.shape[0], outs.shape[1])
    chunks = zip(outs.split(rows), targets.split(rows), reached.split(rows), strict=True)
    # logits of one chunk at a time are held, and made again for its gradient
    sums = [checkpoint(_sums, head, *chunk, lm_head, use_reentrant=False) for chunk in chunks]
    total = torch.stack(sums).sum(0)
    return total[0], total.detach()


def _sums(head, outs, targets, reached, lm_head) -> torch.Tensor:
    with torch.no_grad():
        said = F.linear(targets.to(lm_head.dtype), lm_head).float()
        known = head.t2d[said.argmax(-1)]
        expected = said[:, head.token_ids].softmax(-1)[:, None]
        place = expected[:, 0].argmax(-1, keepdim=True)  # of the target's choice, where it is known
        weights = DECAY ** torch.arange(outs.shape[1], device=outs.device)
    logits = head.logits(outs).float()
    token = -(expected * logits.log_softmax(-1)).sum(-1) * (reached & known[:, None])
    with torch.no_grad():
        rank = (logits[:, 0] > logits[:, 0].gather(1, place)).sum(1)
        hits = [(known & (rank < k)).sum().float() for k in (1, 2, 3)]
        none = token.new_zeros(())
    return torch.stack([(token * weights).sum(), none, token.sum().detach(), none, *hits])
