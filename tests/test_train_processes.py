"""Two processes that share a step have the gradients of one that does it alone."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_train_steps import make_trainer, write_data

from vispec.train.samples import collate, micro_batches
from vispec.train.trainer import Processes

METHODS = ("eagle2", "vispec")


def gradients(folder, processes, batch_size):
    """The summed gradients of one step over six samples, for both methods."""
    found = {}
    for method in METHODS:
        trainer = make_trainer(folder / "data", folder / f"cp{processes.index}", method, processes=processes)
        batches = micro_batches(range(6), batch_size, processes.index, processes.count)
        trainer.accumulate([collate([trainer.train_set[(i, 0)] for i in batch]) for batch in batches])
        found[method] = [p.grad.clone() for p in trainer.parameters]
    return found


def work(index, folder):
    # accelerate says "cpu:0", which is not the device that tensors on the CPU say they are on
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=2)
    torch.save(gradients(folder, Processes(torch.device("cpu", 0), index, 2), 1), folder / f"gradients{index}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    write_data(tmp_path / "data")
    alone = gradients(tmp_path, Processes(torch.device("cpu")), 6)
    mp.spawn(work, (tmp_path,), nprocs=2)
    for index in range(2):
        shared = torch.load(tmp_path / f"gradients{index}.pt")
        for method in METHODS:
            for a, b in zip(alone[method], shared[method], strict=True):
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(alone["vispec"][0], torch.zeros_like(alone["vispec"][0]))
