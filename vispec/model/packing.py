"""Matrices packed once, for products with a few tokens on a CPU.

PyTorch's libraries read a matrix in an order of their own, into which they copy it at every call, or they read it as it
lies, which is slower. With few tokens the copy takes longer than the product. oneDNN can keep the copy: on two cores of
an EPYC, a product of 576 x 1536 numbers with one token takes 0.45 of the time in float32 and 0.7 in bfloat16, with
twelve 0.36 and 0.6. Below `LEAST_NUMBERS` the call itself costs more than is won.

Both arms use it. The copies take the memory of the matrices once more, so a large model goes without.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from vispec.model.passes import in_decoding_pass

LEAST_NUMBERS = 100_000
"""Smaller matrices are left alone."""
MOST_BYTES = 2**31
"""A model whose matrices are larger than this together is left alone."""
USUAL_ROWS = 16
"""How many tokens a copy is packed for; it serves other numbers too."""


@dataclass(frozen=True)
class _Copy:
    """A packed weight, and what of."""

    weight: torch.Tensor
    address: int
    version: int
    packed: torch.Tensor

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether it is still the same: weights may be loaded, trained or moved."""
        return self.weight is weight and self.version == weight._version and self.address == weight.data_ptr()


class PackableLinear(nn.Linear):
    """A linear layer that uses a packed copy of its weight in passes of decoding."""

    _copy: _Copy | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        # under autocast the two dtypes may differ, which is for F.linear to settle
        if not in_decoding_pass() or x.dtype != weight.dtype or not _can_be_packed(weight):
            return F.linear(x, weight, self.bias)
        if self._copy is None or not self._copy.is_of(weight):
            self._copy = _pack(weight)
        return torch.ops.mkldnn._linear_pointwise.default(x, self._copy.packed, self.bias, "none", [], "")

    def __getstate__(self) -> dict:
        """Copies and pickled layers make a packed copy of their own."""
        return {name: value for name, value in vars(self).items() if name != "_copy"}


def allow_packing(*modules: nn.Module) -> None:
    """Let the plain linear layers in modules use packed copies, where they compute on a CPU and are small enough."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    # and no other kinds of linear layers, which may be quantised
    layers = [layer for module in modules for layer in module.modules() if type(layer) is nn.Linear]
    layers = [layer for layer in layers if layer.weight.numel() >= LEAST_NUMBERS and _can_be_packed(layer.weight)]
    if sum(layer.weight.nbytes for layer in layers) <= MOST_BYTES:
        for layer in layers:
            layer.__class__ = PackableLinear


def _pack(weight: torch.Tensor) -> _Copy:
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), USUAL_ROWS)
    return _Copy(weight, weight.data_ptr(), weight._version, packed)


def _can_be_packed(weight: torch.Tensor) -> bool:
    return weight.is_cpu and weight.dtype in _dtypes() and not weight.is_inference()


@lru_cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """Those that oneDNN computes in on this machine."""
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)
