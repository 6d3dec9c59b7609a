"""Matrices packed once, for passes over a few tokens on a CPU.

A product of a matrix with one token reads the matrix as it lies. For several tokens the CPU's libraries first copy it
into the order in which their kernels read it, at every call: with small matrices that takes as long as the product.
oneDNN can keep the packed copy. Verification of a tree and the draft's passes over a level use it; a plain step, of one
token, has no use for it.

The copies take the memory of the matrices once more, so a large model goes without.
"""

from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from vispec.model.passes import in_decoding_pass

MOST_BYTES = 2**30
"""A model whose matrices are larger than this together is left alone."""
USUAL_ROWS = 16
"""How many tokens a copy is packed for; it serves other numbers too."""

_packed: "WeakKeyDictionary[nn.Linear, tuple[tuple, torch.Tensor]]" = WeakKeyDictionary()


class PackableLinear(nn.Linear):
    """A linear layer that uses a packed copy of its weight in passes of decoding over several tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not in_decoding_pass() or x.shape[:-1].numel() == 1 or not _can_be_packed(self.weight):
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed_weight(), self.bias, "none", [], "")

    def _packed_weight(self) -> torch.Tensor:
        weight = self.weight
        state = weight, weight.data_ptr(), weight._version  # another one after weights were loaded or trained
        found = _packed.get(self)
        if found is None or found[0][0] is not weight or found[0][1:] != state[1:]:
            with torch.inference_mode(False), torch.no_grad():
                found = state, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), USUAL_ROWS)
            _packed[self] = found
        return found[1]


def allow_packing(*modules: nn.Module) -> None:
    """Let the plain linear layers in modules use packed copies, where they compute on a CPU and are small enough."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    # and no other kinds of linear layers, which may be quantised
    layers = [layer for module in modules for layer in module.modules() if type(layer) is nn.Linear]
    layers = [layer for layer in layers if _can_be_packed(layer.weight)]
    if sum(layer.weight.nbytes for layer in layers) <= MOST_BYTES:
        for layer in layers:
            layer.__class__ = PackableLinear


def _can_be_packed(weight: torch.Tensor) -> bool:
    return weight.is_cpu and weight.dtype in _dtypes() and not weight.is_inference()


@lru_cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """Those that oneDNN computes in on this machine."""
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)
