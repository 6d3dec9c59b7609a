"""Processes that share a step: the gradients of one process alone, and one end when a sample is broken."""

import pytest
import torch
from forked_commands import finish
from launched_steps import STAGES, gradients
from test_train_steps import EIGHT_SHAPES, make_trainer, write_data


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder of a run of two processes, and what each of them found."""
    folder = tmp_path_factory.mktemp("launched")
    write_data(folder / "data", EIGHT_SHAPES)
    finish(["launched_steps", str(folder)], folder / "log", processes=2)
    return folder, [torch.load(folder / f"process{index}.pt") for index in range(2)]


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_do_not_depend_on_the_division(launched, tmp_path, stage):
    """One batch of 8, 8 accumulated batches of 1, 2 processes x batches of 2 x 2 accumulated."""
    folder, processes = launched
    of_one_batch, *others = [
        gradients(make_trainer(folder / "data", tmp_path / str(size), STAGES[stage], batch_size=size))
        for size in (8, 1)
    ]
    assert all(gradient.abs().max() > 1e-3 for gradient in of_one_batch)
    for other in [*others, *[process[stage] for process in processes]]:
        for a, b in zip(of_one_batch, other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_a_broken_sample_of_one_process_stops_all(launched):
    _, processes = launched
    first, second = [process["error"] for process in processes]
    assert first == second
    # batches are dealt in turn: the second process begins with samples 2 and 3
    assert "the loss is not finite in" in first and "00000003.safetensors" in first and first.endswith("saved: True")
    assert not any(f"0000000{index}" in first for index in (0, 1, 2, 4, 5, 6, 7))
