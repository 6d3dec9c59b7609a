"""Captures, as far as they can be tried without a GPU."""

import gc

import pytest
import torch
from fake_cuda import FakeCuda, FakeStream

from vispec.model.graphs import cuda_capture


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    return FakeCuda().install(monkeypatch)


def test_each_device_has_a_capture_stream_of_its_own(cuda):
    """And all graphs of a pool share one stream."""
    for index in (0, 1):
        capture = cuda_capture(torch.device("cuda", index))
        for _ in range(2):
            capture(lambda: None)
    devices, streams, pools = zip(*cuda.captures, strict=True)
    assert devices == (0, 0, 1, 1)
    assert [stream.device for stream in streams] == [0, 0, 1, 1]
    assert len(set(streams)) == len(set(pools)) == 2


def test_an_error_leaves_the_streams_as_they_were(cuda):
    """And it is the step's own error, not the one that ending the capture meets."""
    capture = cuda_capture(torch.device("cuda", 1))

    def step():
        raise RuntimeError("no such kernel")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such kernel"):
            capture(step)
        assert not isinstance(cuda.current(1), FakeStream) and cuda.device == 0
        assert cuda.can_draw, "the random numbers are still those of a capture"


def test_no_garbage_is_collected_while_a_step_is_captured(cuda):
    """It may hold graphs of models that are gone, and to destroy a graph breaks a capture."""
    capture, seen = cuda_capture(torch.device("cuda", 0)), []

    def failing():
        seen.append(gc.isenabled())
        raise RuntimeError("no such kernel")

    capture(lambda: seen.append(gc.isenabled()))
    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="no such kernel"):
        capture(failing)
    assert gc.isenabled() and seen == [False, False]
