"""Steps over fixed memory, captured in CUDA graphs.

A step is a function of tensors whose shapes and addresses do not change. Launching its hundreds of kernels one by one
takes the host longer than a GPU needs for the work of small models, so there a step is recorded once and replayed. What
changes a shape is part of the step's key; each key has a graph of its own. What a step returns is held at one place, so
that the next step finds it there.
"""

import gc
import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger("vispec")

Step = Callable[[], None]
Value = TypeVar("Value")

CAPTURED_USE = 3
"""A step is captured when it is needed for this time: a capture costs as much as many launches."""
HOST_READS_POSITIONS = ("dynamic", "longrope")
"""Kinds of rotary embedding whose angles depend on the largest position, for which the host asks the device."""

_one_at_a_time = threading.Lock()
"""Held while steps on a GPU are launched, replayed or captured.

Each generation has a seat of its own, and with it its own tensors, graphs, memory of graphs and capture stream, so two
threads never meet there. What they share are PyTorch's random numbers of a device. While a step is captured they are in
a state in which others can neither draw nor replay; and a replay first writes where the numbers go on to a place that
is the same for all graphs, so its two halves must not mix with those of another replay. (On the device, work of
threads that use different streams may still mix: threads stay on the default stream.) The lock costs nothing: launching
is Python, which runs one thread at a time.
"""


class Steps:
    """Runs steps over the tensors of one seat: by graphs where `can_capture`, else as they are."""

    def __init__(self, device: torch.device, can_capture: bool):
        self._device, self._can_capture = device, can_capture
        self._capture = cuda_capture(device) if can_capture else None
        self._replays: dict[Hashable, Step] = {}
        self._uses: Counter[Hashable] = Counter()
        self._held: dict[Hashable, object] = {}
        self._failed: set[Hashable] = set()
        self._failures = 0
        self.alone = _one_at_a_time if device.type == "cuda" or can_capture else nullcontext()
        """Held by the caller while it runs steps, or does what must not meet a step of another thread."""

    def run(self, key: tuple, reset: Step, step: Callable[..., Value], *args) -> Value:
        """Run a step; steps with equal keys do the same on tensors of the same shapes and addresses.

        Args:
            key: what the step is, what its result's shape depends on (two items), then what else its work depends on.
            reset: takes back what a step that broke off has changed on the host, so that it can run from its beginning.
            step: returns a tensor, or a named tuple of tensors, of such tuples, and of None.
        """
        self._uses[key] += 1
        # at first as it is: libraries load their kernels and take their workspace, which a capture must not see
        if not self._can_capture or self._uses[key] < CAPTURED_USE or key in self._failed:
            return self.hold(key[:3], step(*args))
        if key not in self._replays:
            try:
                self._replays[key] = self._capture(lambda: self._hold_anew(key[:3], step(*args)))
            except RuntimeError as error:
                reason = str(error).strip().splitlines()
                logger.warning("%s goes on without a CUDA graph: capture failed (%s)", key[0], *(reason[:1] or [error]))
                self._failed.add(key)
                self._failures += 1
                reset()
                return self.hold(key[:3], step(*args))
        self._replays[key]()
        return self._held[key[:3]]

    def hold(self, key: Hashable, value: Value) -> Value:
        """The value at a place that is the same each time; where nothing is captured, the value itself."""
        if not self._can_capture:
            return value
        if key not in self._held:
            self._held[key] = _cloned(value)
        else:
            self._hold_anew(key, value)
        return self._held[key]

    def _hold_anew(self, key: Hashable, value: object) -> None:
        for held, tensor in zip(_tensors(self._held[key]), _tensors(value), strict=True):
            held.copy_(tensor)

    def take_failures(self) -> int:
        """How many captures have failed since this was asked last."""
        failures, self._failures = self._failures, 0
        return failures

    def fresh(self) -> "Steps":
        """Steps over other tensors of the same device."""
        return Steps(self._device, self._can_capture)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif value is not None:
        for part in value:
            yield from _tensors(part)


def _cloned(value: object) -> object:
    if isinstance(value, tuple):
        return type(value)(*map(_cloned, value))
    return None if value is None else value.clone()


def cuda_capture(device: torch.device) -> Callable[[Step], Step]:
    """A function from a step to its replay, which does not run the step.

    Its graphs share their memory, so no two of them may run at the same time; no other capture may be under way. Where
    a step cannot be captured, the error is the one that the step met, and the device can be used as before.
    """
    pool = torch.cuda.graph_pool_handle()
    # one of this device: PyTorch's own stream for captures is on the device that was first used for one. All graphs of
    # a pool are captured on the same stream, or they could not share its memory
    stream = torch.cuda.Stream(device)

    def capture(step: Step) -> Step:
        graph, met = torch.cuda.CUDAGraph(), []

        def watched() -> None:
            try:
                step()
            except RuntimeError as error:
                met.append(error)
                raise

        try:
            with torch.cuda.device(device):
                _record(graph, watched, pool, stream)
        except RuntimeError as error:
            _leave_capture_mode(device, stream)
            # to end a capture that went wrong is an error too, which hides the cause
            raise met[0] if met else error from None
        return graph.replay

    return capture


def _record(graph: "torch.cuda.CUDAGraph", step: Step, pool: object, stream: "torch.cuda.Stream") -> None:
    # a capture that cannot be ended leaves its own stream as the current one
    with torch.cuda.stream(torch.cuda.current_stream()), _no_garbage_collection():
        # other threads may go on allocating meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            step()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Graphs of models that are gone may wait in cycles; to destroy one breaks the capture that is under way."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _leave_capture_mode(device: torch.device, stream: "torch.cuda.Stream") -> None:
    """Make a capture that succeeds.

    Up to a version of PyTorch after 2.6, a capture that fails leaves the random numbers of the device in the state for
    captures, in which nothing can be drawn outside of one.
    """
    with suppress(RuntimeError), torch.cuda.device(device):
        mark = torch.zeros(1, device=device)
        _record(torch.cuda.CUDAGraph(), mark.zero_, torch.cuda.graph_pool_handle(), stream)


def obstacle(model: PreTrainedModel, decoder: nn.Module, devices: Sequence[torch.device]) -> str | None:
    """Why steps of a target cannot be captured; None if nothing is known that is against it."""
    names = sorted({str(device) for device in devices})
    if len(names) > 1:
        return f"the target is spread over {', '.join(names)}"
    if devices[0].type != "cuda":
        return f"the target is on {devices[0]}"
    return model_obstacle(model, decoder)


def model_obstacle(model: PreTrainedModel, decoder: nn.Module) -> str | None:
    """What in a model, wherever it is, makes the host wait for values from the device."""
    if any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules()):
        return "parts of the target are loaded when they are needed"
    quantization = getattr(model.config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    method = str(getattr(getattr(method, "quant_method", method), "value", method)) if method is not None else ""
    if "bitsandbytes" in method:
        return f"the target is quantised by {method}"
    for module in decoder.modules():
        if hasattr(module, "experts"):
            return f"{type(module).__name__} chooses its experts by values"
    return angles_by_length(decoder)


def angles_by_length(decoder: nn.Module) -> str | None:
    """What is said of a decoder whose angles depend on how long a text is; None where they do not."""
    types = [str(getattr(module, "rope_type", "")) for module in decoder.modules()]  # layers may have several
    kind = next((kind for kind in HOST_READS_POSITIONS if any(kind in found for found in types)), None)
    return None if kind is None else f"the angles of {kind} rotary embeddings depend on the length of the text"
