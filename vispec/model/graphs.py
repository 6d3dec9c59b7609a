"""Steps over fixed memory, captured in CUDA graphs.

A step is a function without arguments or result that works on tensors whose shapes and addresses do not change: it
reads them and writes into them. Launching its hundreds of kernels one by one takes the host longer than a GPU needs for
the work of small models, so there a step is recorded once and replayed. What changes a shape is part of the step's key;
each key has a graph of its own.
"""

import gc
import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vispec.model.target import Target

logger = logging.getLogger("vispec")

Step = Callable[[], None]

CAPTURED_USE = 3
"""A step is captured when it is needed for this time: a capture costs as much as many launches."""
HOST_READS_POSITIONS = ("dynamic", "longrope")
"""Kinds of rotary embedding whose angles depend on the largest position, for which the host asks the device."""

_one_at_a_time = threading.Lock()
"""Held by every step on a GPU, while it is launched, replayed or captured.

Each generation has a seat of its own, and with it its own tensors, graphs, memory of graphs and capture stream, so two
threads never meet there. What they share are PyTorch's random numbers of a device. While a step is captured they are in
a state in which others can neither draw nor replay; and a replay first writes where the numbers go on to a place that
is the same for all graphs, so its two halves must not mix with those of another replay. (On the device, work of
threads that use different streams may still mix: threads stay on the default stream.) The lock costs nothing: launching
is Python, which runs one thread at a time.
"""


class Steps:
    """Runs steps over one set of tensors: by graphs where the target allows it, else as they are."""

    def __init__(self, target: "Target"):
        self._target = target
        self._capture = cuda_capture(target.device) if target.can_capture else None
        self._replays: dict[Hashable, Step] = {}
        self._uses: Counter[Hashable] = Counter()
        self.alone = _one_at_a_time if target.device.type == "cuda" or target.can_capture else nullcontext()
        """Held while something is done that must not meet a step of another thread: random numbers are drawn."""

    def run(self, key: Hashable, step: Step, reset: Step) -> None:
        """Run a step; steps with equal keys do the same on tensors of the same shapes and addresses.

        `reset` takes back what a step that broke off has changed on the host, so that it can be run from its beginning.
        """
        with self.alone:
            self._run(key, step, reset)

    def _run(self, key: Hashable, step: Step, reset: Step) -> None:
        self._uses[key] += 1
        # at first as it is: libraries load their kernels and take their workspace, which a capture must not see
        if not self._target.can_capture or self._uses[key] < CAPTURED_USE:
            step()
        else:
            replay = self._replays.get(key) or self._captured(key, step, reset)
            replay()

    def _captured(self, key: Hashable, step: Step, reset: Step) -> Step:
        try:
            replay = self._capture(step)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()
            logger.warning("decoding goes on without CUDA graphs: capture failed (%s)", reason[0] if reason else error)
            self._target.can_capture = False
            self._replays.clear()
            reset()
            return step
        self._replays[key] = replay
        return replay


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


def obstacle(target: "Target") -> str | None:
    """Why steps of this target cannot be captured; None if nothing is known that is against it."""
    devices = {str(device) for device in target.devices}
    if len(devices) > 1:
        return f"the target is spread over {', '.join(sorted(devices))}"
    if target.device.type != "cuda":
        return f"the target is on {target.device}"
    return model_obstacle(target)


def model_obstacle(target: "Target") -> str | None:
    """What in a model, wherever it is, makes the host wait for values from the device."""
    modules = list(target.model.modules())
    if any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in modules):
        return "parts of the target are loaded when they are needed"
    quantization = getattr(target.config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    method = str(getattr(getattr(method, "quant_method", method), "value", method)) if method is not None else ""
    if "bitsandbytes" in method:
        return f"the target is quantised by {method}"
    for module in target.decoder.modules():
        if hasattr(module, "experts"):
            return f"{type(module).__name__} chooses its experts by values"
        kind = next((kind for kind in HOST_READS_POSITIONS if kind in str(getattr(module, "rope_type", ""))), None)
        if kind is not None:
            return f"the angles of {kind} rotary embeddings depend on the length of the text"
    return None
