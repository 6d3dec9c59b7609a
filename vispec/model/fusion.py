"""The small operations of a decoder layer, fused on a GPU.

Between its matrix products a Llama layer of transformers launches some thirty kernels of one to three microseconds:
norms, rotary embedding, activation. In a pass over one token of a 7B target on an H100 they take a sixth of the time.
torch.compile makes one kernel of each group.

What is compiled are transformers' own functions, so each family keeps its arithmetic. They ask which pass it is: only
those of decoding meet the compiled ones. The first passes compile, which takes some seconds; PyTorch keeps the result
on disk. Its variable TORCH_COMPILE_DISABLE=1 turns all of this off.
"""

import functools
import logging
import sys
from collections.abc import Callable

import torch
from torch import nn

from vispec.model.passes import in_decoding_pass

logger = logging.getLogger("vispec")

BACKEND, DEVICE = "inductor", "cuda"
ROTARY_FUNCTIONS = ("apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb")
MLP_PARTS = ("gate_proj", "up_proj", "down_proj")


def fuse(decoder: nn.Module) -> None:
    """Give the norms, the MLPs and the rotary embedding of a text decoder a compiled twin for passes of decoding."""
    if next(decoder.parameters()).device.type != DEVICE:
        return
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
        if not in_decoding_pass() or compiled is None or not _on_device(*args, *kwargs.values()):
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


def _on_device(*arguments) -> bool:
    return any(isinstance(argument, torch.Tensor) and argument.device.type == DEVICE for argument in arguments)
