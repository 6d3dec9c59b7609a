"""The small operations of a decoder layer, fused on a GPU.

Between its matrix products a Llama layer of transformers launches some thirty kernels of one to three microseconds:
norms, rotary embedding, activation. In a pass over one token of a 7B target on an H100 they take a sixth of the time.
torch.compile makes one kernel of each group.

What is compiled are transformers' own functions, so each family keeps its arithmetic. They ask which pass it is: only
those made inside `fused_pass` meet the compiled ones, other users of the model and of its classes what they know. The
first passes compile, which takes some seconds; PyTorch keeps the result on disk. Its variable TORCH_COMPILE_DISABLE=1
turns all of this off.
"""

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

logger = logging.getLogger("vispec")

BACKEND = "inductor"
ROTARY_FUNCTIONS = ("apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb")
MLP_PARTS = ("gate_proj", "up_proj", "down_proj")

_in_fused_pass: ContextVar[bool] = ContextVar("in_fused_pass", default=False)


@contextmanager
def fused_pass() -> Iterator[None]:
    """Passes of this thread use the compiled functions of what was given to `fuse`."""
    token = _in_fused_pass.set(True)
    try:
        yield
    finally:
        _in_fused_pass.reset(token)


def fuse(decoder: nn.Module) -> None:
    """Give the norms, the MLPs and the rotary embedding of a text decoder a compiled twin for fused passes."""
    for module in decoder.modules():
        is_mlp = all(type(getattr(module, part, None)) is nn.Linear for part in MLP_PARTS)
        if is_mlp or type(module).__name__.endswith("RMSNorm"):
            _give_twin(type(module), "forward")
    for source in {sys.modules[type(layer.self_attn).__module__] for layer in decoder.layers}:
        for name in ROTARY_FUNCTIONS:
            if hasattr(source, name):
                _give_twin(source, name)


def _give_twin(owner: object, name: str) -> None:
    """Put a function that chooses between the stock one and its compiled twin in the stock one's place, once."""
    stock = getattr(owner, name)
    if not hasattr(stock, "has_twin"):
        setattr(owner, name, _choosing(stock))


def _choosing(stock: Callable) -> Callable:
    compiled = torch.compile(stock, dynamic=True, backend=BACKEND)

    @functools.wraps(stock)
    def either(*args, **kwargs):
        nonlocal compiled
        if not _in_fused_pass.get() or compiled is None:
            return stock(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, no Triton, a kind of tensor it cannot trace: all have their own class
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise  # the capture failed, not the compiler, which has done its work before
            compiled = None
            # the first line says where it failed, the second why
            reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
            logger.warning("%s runs unfused: torch.compile failed (%s)", stock.__qualname__, reason)
            return stock(*args, **kwargs)

    either.has_twin = True
    return either
