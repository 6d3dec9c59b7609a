"""The processes that train together: which one this is, and what they have to tell each other."""

import atexit
import os
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist


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

    def gather(self, values: list) -> list:
        """The lists of all processes as one."""
        if self.count == 1:
            return values
        found: list = [None] * self.count
        dist.all_gather_object(found, values)
        return [value for part in found for value in part]

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
    """As `accelerate launch` started us, or a single process."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"--mixed_precision={accelerator.mixed_precision} is not supported; choose bf16 or no")
    return Processes(
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.autocast if accelerator.mixed_precision == "bf16" else None,
    )
