"""What a training run does, apart from data and start weights."""

from dataclasses import asdict, dataclass

from vispec.train.losses import Objective

OTHER_FIELDS = ("save_every", "save_steps", "save_dtype", "save_embedding", "keep", "workers", "report_to")
"""Of a recipe: what does not decide the weights, so that a run may go on with others."""


@dataclass(frozen=True)
class Recipe:
    """What a training run does, apart from data and start weights.

    Attributes:
        clip_value, clip_norm: gradients are cut at a value, or scaled down to a norm where there is one.
        save_dtype, save_embedding: of checkpoints; the state that a run goes on from is exact.
        keep: newest checkpoints that stay; 0 for all.
    """

    objective: Objective
    lr: float
    mtp_steps: int = 0
    epochs: int = 20
    batch_size: int = 1
    accumulation: int = 1
    clip_value: float = 0.5
    clip_norm: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    seed: int = 0
    save_every: int = 1
    save_steps: int = 0
    save_dtype: str = "float32"
    save_embedding: bool = True
    keep: int = 0
    workers: int = 0
    report_to: str = "none"


def schedule(step: int, steps_per_epoch: int, epochs: int) -> float:
    """Factor of the learning rate at a step: linear warm-up, then linear decay to 0 after the last step.

    The warm-up takes the first epoch, or half of the only one.
    """
    last = steps_per_epoch * epochs
    warmup = min(steps_per_epoch, last // 2)
    if step < warmup:
        return (step + 1) / warmup
    return (last - step) / (last - warmup)


def recipe_identity(recipe: Recipe) -> dict:
    """The parts of a recipe that decide the weights, as plain values."""
    values = {name: value for name, value in asdict(recipe).items() if name not in OTHER_FIELDS}
    objective = values.pop("objective")
    return {**values, **objective, "betas": list(recipe.betas)}
