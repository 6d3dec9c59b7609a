"""Matrices packed once, for products with a few tokens on a CPU.

PyTorch's libraries read a matrix in an order of their own, into which they copy it at every call, or they read it as it
lies, which is slower. With few tokens the copy takes longer than the product. oneDNN can keep the copy: on two cores of
an EPYC, a product of 576 x 1536 numbers with one token takes 0.45 of the time in float32 and 0.7 in bfloat16, with
twelve 0.36 and 0.6. Below `LEAST_NUMBERS` the call itself costs more than is won.

Both arms use it. The copies take the memory of the matrices once more, so a large model goes without.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from vispec.model.passes import in_decoding_pass

LEAST_NUMBERS = {torch.float32: 150_000, torch.bfloat16: 0}
"""Smaller matrices are left alone: there the call itself costs more than is won."""
MOST_BYTES = 2**31
"""A model whose matrices are larger than this together is left alone."""
USUAL_ROWS = 16
"""How many tokens a copy is packed for; it serves other numbers too."""

_prompts = 0
"""How many prompts were read so far."""


def expect_new_weights() -> None:
    """With every prompt: weights may have been loaded, trained or moved since the last one, though not within one."""
    global _prompts
    _prompts += 1


class PackableLinear(nn.Linear):
    """A linear layer that uses a packed copy of its weight in passes of decoding; made by `allow_packing`."""

    _kept: "_Kept"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        copy = self._kept.of(self) if in_decoding_pass() else None
        if copy is None or copy.dtype != x.dtype:  # these differ under autocast, which F.linear knows
            return F.linear(x, self.weight, self.bias)
        return copy(x)


PLAIN = nn.Linear, PackableLinear
"""Kinds of linear layers that are what they seem; others may be quantised."""


class Joined:
    """Several linear layers over the same input, which passes of decoding on a CPU compute as one product.

    With few tokens the call of a product takes as long as a small product itself.
    """

    def __init__(self):
        self._kept = _Kept()

    def __call__(self, x: torch.Tensor, *layers: nn.Linear) -> Sequence[torch.Tensor]:
        """What each of the layers makes of x; all have a bias or none has."""
        copy = self._kept.of(*layers) if in_decoding_pass() else None
        if copy is None or copy.dtype != x.dtype:
            return [layer(x) for layer in layers]
        return copy(x).split(copy.sizes, dim=-1)


def allow_packing(*modules: nn.Module) -> None:
    """Let the plain linear layers in modules use packed copies, where they compute on a CPU and are small enough."""
    if not _has_packing():
        return
    layers = [layer for module in modules for layer in module.modules() if type(layer) in PLAIN]
    layers = [layer for layer in layers if _can_be_copied(layer) and _pays(layer.weight)]
    if sum(layer.weight.nbytes for layer in layers) <= MOST_BYTES:
        for layer in layers:
            layer.__class__ = PackableLinear
            layer._kept = _Kept()


class _Kept:
    """A copy of the weights of some layers, from prompt to prompt; what is copied or pickled starts without."""

    def __init__(self):
        self._copy: _Copy | None = None
        self._prompt: int | None = None

    def of(self, *layers: nn.Linear) -> "_Copy | None":
        """The copy, made anew if the weights are others; None where layers compute by themselves."""
        if self._prompt != _prompts:
            if self._copy is None or not self._copy.is_of(layers):
                possible = all(map(_can_be_copied, layers)) and sum(x.weight.nbytes for x in layers) <= MOST_BYTES
                self._copy = _Copy(layers) if possible else None
            self._prompt = _prompts
        return self._copy

    def __reduce__(self):
        return _Kept, ()


class _Copy:
    """The weights of some layers in one matrix, packed if that pays, and a note of what it was made from."""

    def __init__(self, layers: Sequence[nn.Linear]):
        self._of = _marks(layers)
        self.dtype = layers[0].weight.dtype
        self.sizes = [layer.out_features for layer in layers]
        with torch.inference_mode(False), torch.no_grad():
            self._bias = None if layers[0].bias is None else _joined([layer.bias.detach() for layer in layers])
            matrix = _joined([layer.weight.detach() for layer in layers])
            self._packed = _has_packing() and _pays(matrix)
            self._matrix = _pack(matrix) if self._packed else matrix

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise.default(x, self._matrix, self._bias, "none", [], "")
        return F.linear(x, self._matrix, self._bias)

    def is_of(self, layers: Sequence[nn.Linear]) -> bool:
        marks = _marks(layers)
        return len(marks) == len(self._of) and all(
            tensor is known and rest == marked
            for (tensor, *rest), (known, *marked) in zip(marks, self._of, strict=True)
        )


def _marks(layers: Sequence[nn.Linear]) -> list[tuple[torch.Tensor, int, int]]:
    """Weights and biases, each with what changes when its numbers do."""
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None]
    return [(tensor, tensor.data_ptr(), tensor._version) for tensor in tensors]


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _pack(matrix: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(matrix, USUAL_ROWS)


def _can_be_copied(layer: nn.Linear) -> bool:
    weight = layer.weight if type(layer) in PLAIN else None
    return weight is not None and weight.is_cpu and weight.dtype in _dtypes() and not weight.is_inference()


def _pays(matrix: torch.Tensor) -> bool:
    return matrix.numel() >= LEAST_NUMBERS[matrix.dtype]


@lru_cache
def _has_packing() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@lru_cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """Those that oneDNN computes in on this machine."""
    bfloat16 = _has_packing() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)
