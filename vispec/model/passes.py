"""Which passes over the models are those of decoding.

What is done to a target for the sake of speed (its attention, fused kernels, packed matrices) holds in these passes
only: whoever else uses the model meets what transformers made it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_decoding: ContextVar[bool] = ContextVar("decoding", default=False)


@contextmanager
def decoding_pass() -> Iterator[None]:
    """Passes of this thread are those of decoding, also where the function is a decorator."""
    token = _decoding.set(True)
    try:
        yield
    finally:
        _decoding.reset(token)


def in_decoding_pass() -> bool:
    return _decoding.get()
