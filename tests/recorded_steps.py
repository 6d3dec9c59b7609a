"""CUDA graphs in place of which a CPU records the operations of a step and repeats them.

What a graph would not see again is not seen here either: numbers that the step took from the host, tensors that are no
longer those of the recording, decisions that depended on values. What a graph could not hold is an error.
"""

from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

IMPOSSIBLE = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "lift_fresh")
"""Operations that wait for values from the device, have shapes that depend on them, or bring numbers from the host."""


def tensors(value) -> Iterator[torch.Tensor]:
    """All of an operation's arguments or results; torch's own trees would take most of the time of a replay."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


class Recorder(TorchDispatchMode):
    def __init__(self, most: int | None = None):
        """`most` is how many operations are possible; None for any number."""
        super().__init__()
        self.calls = []
        self._most = most
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        if name in IMPOSSIBLE:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if len(self.calls) == self._most:
            raise RuntimeError("operation not permitted when stream is capturing\nmore about it")
        if func._schema.is_mutable:
            for tensor in tensors([*args, *kwargs.values()]):
                storage = tensor.untyped_storage()
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)


def record(step: Callable[[], None]) -> Callable[[], None]:
    """The replay of a step, which is not run: what it did is undone."""
    random = torch.get_rng_state()
    with Recorder() as recorder:
        step()
    recorder.undo()
    torch.set_rng_state(random)

    @torch.inference_mode()
    def replay() -> None:
        # what was made during the recording is made again; all other tensors are those of the recording
        made: dict[int, torch.Tensor] = {}

        def now(value):
            if isinstance(value, torch.Tensor):
                return made.get(id(value), value)
            return [now(part) for part in value] if isinstance(value, list | tuple) else value

        for func, args, kwargs, out in recorder.calls:
            again = func(*map(now, args), **{name: now(value) for name, value in kwargs.items()})
            for old, new in zip(tensors(out), tensors(again), strict=True):
                assert old.shape == new.shape
                made[id(old)] = new

    return replay


def break_off(step: Callable[[], None], operations: int | None) -> None:
    """A capture that fails after so many operations of the step, None: after all; what they did is undone."""
    random, recorder = torch.get_rng_state(), Recorder(operations)
    try:
        with recorder:
            step()
        raise RuntimeError("operation not permitted when stream is capturing\nmore about it")
    finally:
        recorder.undo()
        torch.set_rng_state(random)
