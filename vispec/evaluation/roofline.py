"""What the hardware allows: measured rates of a device, and the least time that work of a known size takes on it.

A pass of a model reads its weights and the keys and values once and multiplies every row with every weight. Its floor
is the larger of bytes over the rate of a copy and operations over the rate of a matrix product, both measured here. A
copy counts what it reads and what it writes. Two things can bring a time below its floor: weights that stay in a cache
from one pass to the next, and a CPU that reads faster than it copies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from vispec.timing import now

if TYPE_CHECKING:
    import torch
    from torch import nn

COPIED_BYTES = {"cuda": 2**30, "cpu": 2**28}
"""Size of the buffer whose copies are timed: far above any cache."""
PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the square matrices whose product is timed."""


@dataclass(frozen=True)
class Cost:
    """Bytes moved and floating-point operations done."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Rates:
    """What a device reached."""

    bandwidth: float
    """Bytes a second of a large copy, read and written bytes counted."""
    matmul: float
    """Operations a second of a large matrix product, a multiplication and an addition counted as two."""

    def floor(self, cost: Cost) -> float:
        """Least seconds that the work can take."""
        return max(cost.bytes / self.bandwidth, cost.flops / self.matmul)


def measure_rates(device: "torch.device", dtype: "torch.dtype", repeats: int = 10) -> Rates:
    """Copy bandwidth and matrix rate of a device, medians of `repeats`."""
    import torch

    size = COPIED_BYTES[device.type]
    source, copy = torch.ones(2, size, dtype=torch.uint8, device=device)
    bandwidth = 2 * size / median(timed(lambda: copy.copy_(source), device, repeats))
    n = PRODUCT_SIZE[device.type]
    # random numbers: zeros draw less power, and some devices multiply them faster
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return Rates(bandwidth, 2 * n**3 / median(timed(lambda: a @ b, device, repeats)))


def timed(work: Callable[[], object], device: "torch.device", repeats: int, warm_ups: int = 2) -> list[float]:
    """Seconds of each of `repeats` runs of `work`, the device waited for."""
    for _ in range(warm_ups):
        work()
    times = []
    for _ in range(repeats):
        start = now(device)
        work()
        times.append(now(device) - start)
    return times


def pass_cost(modules: "list[nn.Module]", rows: int) -> Cost:
    """A pass of `rows` rows through modules: every weight is read once, of an embedding table only the rows looked up.

    Weights that modules share are counted once. Attention over keys and values is not in it, see `attention_cost`.
    """
    from torch import nn

    cost, counted = Cost(), set()
    for module in (part for whole in modules for part in whole.modules()):
        for weight in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                cost += Cost(bytes=rows * weight.shape[1] * weight.element_size())
            elif id(weight) not in counted:
                counted.add(id(weight))
                products = 2 * rows * weight.numel() if weight.dim() > 1 else 0
                cost += Cost(weight.numel() * weight.element_size(), products)
    return cost


def attention_cost(
    layers: int, heads: int, kv_heads: int, head_dim: int, rows: int, keys: int, element_size: int
) -> Cost:
    """Attention of `rows` queries over `keys` cached tokens: keys and values are read once."""
    read = 2 * layers * kv_heads * head_dim * keys * element_size
    return Cost(read, 4 * layers * heads * head_dim * rows * keys)
