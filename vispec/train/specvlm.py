"""Training of SpecVLM's head: EAGLE-2's losses, and a gate that learns to choose by Gumbel-softmax.

What the gate draws depends on the seed, the epoch and the sample's file name, so neither batches nor interruptions
change it; where nothing is learned, held-out samples among it, its first choice holds, as in decoding. It reads a
sample's features as they are given, with their noise, up to the first token that is scored.

As published: the loss, AdamW without weight decay, no warm-up. Ours: a linear decay to 0, and gradients scaled down to
a norm, as for EAGLE-2.

Shapes: B samples, K branches that the gate weighs.
"""

from pathlib import Path

import torch

from vispec.model.drafts import SpecVLMHead
from vispec.model.pairs import PairLayout
from vispec.train.samples import Batch, sample_generator
from vispec.train.trainer import Trainer

EPOCHS, LR = 5, 8e-5


def prompt_lengths(batch: Batch) -> list[int]:
    """Tokens before the first one of an answer, in each sample; all of them where nothing is scored."""
    rows, pairs = batch.scored.div(batch.ids.shape[1], rounding_mode="floor"), batch.scored % batch.ids.shape[1]
    lengths = torch.tensor(batch.lengths, device=rows.device)
    return lengths.scatter_reduce(0, rows, pairs + 2, "amin").tolist()  # pair i predicts token i+2


class SpecVLMTrainer(Trainer):
    """Trains a SpecVLM head; arguments as for `Trainer`."""

    head: SpecVLMHead

    def layout(self, batch: Batch) -> PairLayout:
        noise = self._noise(batch) if self.head.training else None
        weights = self.head.weights(batch.hidden, batch.images, prompt_lengths(batch), noise)
        return self.head.plan(batch.lengths, batch.images, weights)

    def _rate(self, step: int) -> float:
        return self.recipe.lr * (1 - step / (self.steps_per_epoch * self.recipe.epochs))

    def _noise(self, batch: Batch) -> torch.Tensor:
        """(B, K) of Gumbel's distribution."""
        names = (Path(name).name for name in batch.names)
        generators = (sample_generator(self.recipe.seed, self.epoch, name) for name in names)
        drawn = torch.stack([torch.rand(len(self.head.compressor.branches), generator=one) for one in generators])
        return -(-drawn.clamp(min=torch.finfo(drawn.dtype).tiny).log()).log().to(batch.hidden.device)
