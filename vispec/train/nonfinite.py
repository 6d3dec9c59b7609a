"""Where a step's loss or gradient is not finite: the samples that make it so, found by computing them one by one."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from vispec.train.samples import Batch


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """The 2-norm of all gradients together; nan or inf if one of their numbers is."""
    norms = [parameter.grad.norm() for parameter in parameters if parameter.grad is not None]
    return torch.stack(norms).norm().item() if norms else 0.0


def spoiled_samples(
    batches: Iterable[Batch],
    loss_of: Callable[[Batch], torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
) -> list[str]:
    """The files whose own loss, or its gradient, is not finite. The parameters have no gradients before or after."""
    names = []
    for batch in batches:
        for row in range(len(batch.names)):
            loss = loss_of(one_row(batch, row))
            loss.backward()
            if not (math.isfinite(loss.item()) and math.isfinite(gradient_norm(parameters))):
                names.append(batch.names[row])
            for parameter in parameters:
                parameter.grad = None
    return names


def one_row(batch: Batch, row: int) -> Batch:
    """A batch of one of the samples, as long as before: in a batch, one sample's nan reaches the others' gradients."""
    length, one = batch.ids.shape[1], slice(row, row + 1)

    def inside(places: torch.Tensor) -> torch.Tensor:
        return torch.div(places, length, rounding_mode="floor") == row

    image, scored = inside(batch.image_index), inside(batch.scored)
    return replace(
        batch,
        ids=batch.ids[one],
        hidden=batch.hidden[one],
        image_rows=batch.image_rows[image],
        image_index=batch.image_index[image] - row * length,
        scored=batch.scored[scored] - row * length,
        targets=batch.targets[scored],
        images=batch.images[one],
        lengths=batch.lengths[one],
        names=batch.names[one],
    )
