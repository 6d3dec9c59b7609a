"""Steps over fixed memory, captured in CUDA graphs.

A step is a function without arguments or result that works on tensors whose shapes and addresses do not change: it
reads them and writes into them. Launching its hundreds of kernels one by one takes the host longer than a GPU needs for
the work of small models, so there a step is recorded once and replayed. What changes a shape is part of the step's key;
each key has a graph of its own.
"""

import logging
import threading
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vispec.model.target import Target

logger = logging.getLogger("vispec")

Step = Callable[[], None]

_one_capture_at_a_time = threading.Lock()


class Steps:
    """Runs steps over one set of tensors: by graphs where the target allows it, else as they are."""

    def __init__(self, target: "Target"):
        self._target = target
        self._capture = cuda_capture(target.device) if target.can_capture else None
        self._replays: dict[Hashable, Step | None] = {}

    def run(self, key: Hashable, step: Step) -> None:
        """Run a step; steps with equal keys do the same on tensors of the same shapes and addresses."""
        if self._capture is None:
            step()
        elif key not in self._replays:
            step()  # libraries load their kernels and take their workspace, which a capture must not see
            self._replays[key] = None
        else:
            replay = self._replays[key] or self._captured(key, step)
            replay()

    def _captured(self, key: Hashable, step: Step) -> Step:
        try:
            replay = self._capture(step)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()
            logger.warning("decoding goes on without CUDA graphs: capture failed (%s)", reason[0] if reason else error)
            self._capture, self._target.can_capture = None, False
            return step
        self._replays[key] = replay
        return replay


def cuda_capture(device: torch.device) -> Callable[[Step], Step]:
    """A function from a step to its replay, which does not run the step.

    Its graphs share their memory, so no two of them may run at the same time.
    """
    pool = torch.cuda.graph_pool_handle()
    # one of this device: PyTorch's own stream for captures is on the device that was first used for one. All graphs of
    # a pool are captured on the same stream, or they could not share its memory
    stream = torch.cuda.Stream(device)

    def capture(step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # other threads may go on allocating meanwhile
        with (
            _one_capture_at_a_time,
            torch.cuda.device(device),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            step()
        return graph.replay

    return capture


def obstacle(target: "Target") -> str | None:
    """Why steps of this target cannot be captured; None if they can."""
    devices = {str(device) for device in target.devices}
    if len(devices) > 1:
        return f"the target is spread over {', '.join(sorted(devices))}"
    if target.device.type != "cuda":
        return f"the target is on {target.device}"
    if any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in target.model.modules()):
        return "parts of the target are loaded when they are needed"
    return None
