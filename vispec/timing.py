"""One clock, and one way in which those that are compared take turns."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def now(device: "torch.device | None" = None) -> float:
    """The clock, in seconds; with a device, after all work that this thread has given to it."""
    if device is not None and device.type == "cuda":
        import torch

        # not the whole device: another thread may be capturing a step there, which that would break
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()


def in_turn(arms: Sequence[T], number: int) -> list[T]:
    """The order of the arms in their turn of this number: another one begins each time, so that none always does."""
    first = number % len(arms)
    return [*arms[first:], *arms[:first]]


def turns(
    arms: Sequence[T], prompts: int, repetitions: int, budget: float = float("inf")
) -> Iterator[tuple[int, int, T]]:
    """Who answers next: (repetition, prompt, arm), both counted from 0.

    Every prompt is answered by all arms before the next one comes, so that a drifting machine hurts all alike.

    Args:
        budget: seconds; no repetition that would probably end later is begun, the first one always runs.
    """
    start = now()
    for repetition in range(repetitions):
        spent = now() - start
        if repetition and spent + spent / repetition > budget:
            return
        for prompt in range(prompts):
            for arm in in_turn(arms, repetition + prompt):
                yield repetition, prompt, arm
