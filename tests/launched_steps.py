"""What test_train_processes.py starts: single steps that the processes share.

Every process writes <folder>/process<index>.pt: for each stage its summed gradients of one step over eight samples, and
the error that all get when a sample of the last process is broken.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from test_train_steps import make_trainer

from vispec.train.processes import Processes
from vispec.train.samples import collate, micro_batches
from vispec.train.trainer import RESUME_FILE, Trainer

STAGES = {"stage 1": "eagle2", "stage 2": "vispec"}


def share(trainer: Trainer) -> list:
    """This process's batches of a step of eight samples."""
    processes = trainer.processes
    batches = micro_batches(range(8), trainer.recipe.batch_size, processes.index, processes.count)
    return [collate([trainer.train_set[(i, 0)] for i in batch]) for batch in batches]


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    trainer.accumulate(share(trainer))
    return [parameter.grad.clone() for parameter in trainer.parameters]


def error_of_a_broken_sample(trainer: Trainer) -> str:
    trainer.optimizer.zero_grad()
    batches = share(trainer)
    if trainer.processes.index == trainer.processes.count - 1:
        batches[0].targets[batches[0].scored // batches[0].ids.shape[1] == 1] = torch.nan
    try:
        trainer.accumulate(batches)
    except ValueError as error:
        return f"{error}; saved: {(trainer.folder / RESUME_FILE).is_file()}"
    return "none"


def main(folder: Path) -> None:
    accelerator = Accelerator()
    processes = Processes(accelerator.device, accelerator.process_index, accelerator.num_processes)
    found = {}
    for stage, method in STAGES.items():
        trainer = make_trainer(
            folder / "data", folder / "checkpoints", method, processes=processes, batch_size=2, accumulation=2
        )
        found[stage] = gradients(trainer)
    found["error"] = error_of_a_broken_sample(trainer)
    torch.save(found, folder / f"process{processes.index}.pt")
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
