"""The little of torch.cuda that a capture uses, for machines without a GPU: it tells what happened on which stream."""

from contextlib import contextmanager

import torch


class FakeCuda:
    """Stands in for torch.cuda's device, streams and graphs, see `install`.

    A capture that meets an error behaves as PyTorch's does: ending it raises another error, the stream on which it was
    made stays the current one, and random numbers can be drawn in captures only, until one succeeds.
    """

    def __init__(self):
        self.device = 0
        self.streams = {}
        """The current stream of each device."""
        self.captures = []
        """(device, stream, pool) of each capture that was begun."""
        self.can_draw = True
        """Whether random numbers can be drawn outside of a capture."""

    def install(self, monkeypatch) -> "FakeCuda":
        names = ("Stream", "CUDAGraph", "graph", "graph_pool_handle", "device", "stream", "current_stream")
        for name in names:
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
        return self

    def current(self, device: int):
        return self.streams.get(device, f"default stream of {device}")

    def _Stream(self, device):
        return FakeStream(torch.device(device).index)

    def _CUDAGraph(self):
        return FakeGraph()

    def _graph_pool_handle(self):
        return object()

    def _current_stream(self, device=None):
        return self.current(self.device if device is None else torch.device(device).index)

    @contextmanager
    def _device(self, device):
        before, self.device = self.device, torch.device(device).index
        try:
            yield
        finally:
            self.device = before

    @contextmanager
    def _stream(self, stream):
        before = dict(self.streams)
        self.streams[self.device] = stream
        try:
            yield
        finally:
            self.streams = before

    @contextmanager
    def _graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        assert stream is not None and stream.device == self.device, "the capture stream is on another device"
        before = dict(self.streams)
        self.streams[self.device] = stream
        self.captures.append((self.device, stream, pool))
        self.can_draw = False
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904 - as torch does
        self.streams, self.can_draw = before, True


class FakeStream:
    def __init__(self, device: int):
        self.device = device


class FakeGraph:
    def replay(self) -> None:
        pass
