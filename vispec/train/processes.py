"""The processes that train together: which one this is, and what they have to tell each other."""

import atexit
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from vispec.children import launcher

NOT_OURS = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
"""What accelerate's settings of another project may have left in the environment."""

logger = logging.getLogger("vispec")


@dataclass(frozen=True)
class Processes:
    """Where this process computes and how many there are."""

    device: torch.device
    index: int = 0
    count: int = 1
    autocast: type[AbstractContextManager] | None = None
    """A context manager's factory for mixed precision."""

    @property
    def mixed_precision(self) -> str:
        """As accelerate's --mixed_precision says it."""
        return "bf16" if self.autocast else "no"

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over all processes; the result may or may not be the tensor itself, changed."""
        if self.count > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Over all processes; the gradients travel as one vector, of which they are parts afterwards."""
        if self.count > 1:
            gradients = [parameter.grad for parameter in parameters]
            vector_to_parameters(self.sum(parameters_to_vector(gradients)), gradients)

    def gather(self, values: list) -> list:
        """The lists of all processes as one."""
        return gather_object(values) if self.count > 1 else values

    def leave(self) -> None:
        """Part from the others when all work is done; the process has nothing left but to end, successfully.

        Threads that listened to the others have aborted processes while Python and PyTorch were taken down, so both
        are left as they are.
        """
        if dist.is_initialized():
            dist.destroy_process_group()
            atexit.register(_end)

    def precision(self) -> AbstractContextManager:
        return self.autocast() if self.autocast else torch.autocast(self.device.type, enabled=False)


def _end() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def launched_processes() -> Processes:
    """As `accelerate launch` started us, or a single process.

    Raises:
        ValueError: settings of accelerate that this training does not have.
    """
    for name in NOT_OURS:
        value = os.environ.get(name, "false")
        if value.lower() not in ("false", "0", ""):
            raise ValueError(f"{name}={value} is set, but this training uses plain processes alone; unset it")
    accelerator = Accelerator()
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"--mixed_precision={accelerator.mixed_precision} is not supported; choose bf16 or no")
    if accelerator.is_main_process:
        _warn(accelerator.num_processes)
    return Processes(
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.autocast if accelerator.mixed_precision == "bf16" else None,
    )


def _warn(processes: int) -> None:
    """Of what accelerate was asked for and does not come about."""
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() not in ("no", ""):
        logger.warning("ACCELERATE_DYNAMO_BACKEND=%s has no effect", dynamo)
    asked = _asked_for()
    if asked is not None and asked != processes:
        logger.warning(
            "accelerate launch was asked for %d processes and started %d; on CPUs it starts several with "
            "ACCELERATE_USE_CPU=true and --multi_gpu instead of --cpu",
            asked,
            processes,
        )


def _asked_for() -> int | None:
    """--num_processes of the launcher that started us; None where it was not given."""
    for word, following in pairwise([*launcher(), ""]):
        name, _, value = word.replace("-", "_").partition("=")
        if name == "__num_processes":
            value = value or following
            return int(value) if value.isdigit() else None
    return None
