"""Training of Medusa's heads.

Head j reads the feature of token p - j and estimates the one of token p + 1, which predicts token p + 2. So the outputs
at a scored pair p are compared with one target feature, as the steps of a draft chain are; only that each head reads
one pair further back. Batches, losses and numbers are those of the other methods, with as many steps as heads.

Shapes: B samples, L tokens, H hidden size, S scored pairs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from vispec.model.drafts import MedusaHead
from vispec.train.metrics import DEPTH
from vispec.train.recipe import Recipe
from vispec.train.samples import Batch
from vispec.train.trainer import Trainer


class MedusaTrainer(Trainer):
    """Trains all heads of a `MedusaHead` at once; arguments as for `Trainer`."""

    head: MedusaHead

    def __init__(self, head: MedusaHead, lm_head, train, held_out, recipe: Recipe, *rest):
        # a head to start from may have fewer or more of them than a new one
        super().__init__(head, lm_head, train, held_out, replace(recipe, mtp_steps=head.fixed_depth), *rest)

    def outputs(self, batch: Batch) -> torch.Tensor:
        """(S, heads, H): the estimates of every head for the target feature of each scored pair."""
        hidden = batch.hidden.flatten(0, 1)
        return torch.stack([block(hidden[batch.scored - j]) for j, block in enumerate(self.head.medusa_head)], dim=1)

    def drafted(self, batch: Batch) -> Iterable[torch.Tensor]:
        return self.outputs(batch).unbind(1)[:DEPTH]

    def _loader(self, *dataset_and_keys) -> Iterator[Batch]:
        batches = super()._loader(*dataset_and_keys)
        return (within_reach(batch, len(self.head.medusa_head)) for batch in batches)


def within_reach(batch: Batch, heads: int) -> Batch:
    """The batch without the scored pairs at which some head has nothing to read.

    All heads read features of text: `heads` pairs in a row, the scored one and those before it, inside the sample and
    not those that an image stands for, whose features a sample file need not hold. Between an image and the
    answer lies a question, so real data lose nothing.
    """
    length = batch.ids.shape[1]
    row, last = batch.scored // length, batch.scored % length
    first = last - (heads - 1)
    kept = first >= 0
    for index, spans in enumerate(batch.images):
        for start, end in spans:
            kept &= (row != index) | (last < start - 1) | (first >= end - 1)
    return replace(batch, scored=batch.scored[kept], targets=batch.targets[kept])
