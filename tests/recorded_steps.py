"""CUDA graphs in place of which a CPU records the operations of a step and repeats them.

What a graph would not see again is not seen here either: numbers that the step took from the host, tensors that are no
longer those of the recording, decisions that depended on values. What a graph could not hold is an error.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

IMPOSSIBLE = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "lift_fresh")
"""Operations that wait for values from the device, have shapes that depend on them, or bring numbers from the host."""


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
            for tensor in tree_iter((args, kwargs)):
                if isinstance(tensor, torch.Tensor):
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
            return made.get(id(value), value) if isinstance(value, torch.Tensor) else value

        for func, args, kwargs, out in recorder.calls:
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, new in zip(tree_iter(out), tree_iter(again), strict=True):
                if isinstance(old, torch.Tensor):
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
