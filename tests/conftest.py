"""Settings for all tests and their child processes: no network, no noise, one thread (the models are tiny, more
threads only cost). Kernels that are measured are remembered for the session alone.
"""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so it has to come first
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="vispec-tests-")

import shutil
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from recorded_steps import record
from tiny_models import recorded_model

from vispec.model import decoding, graphs, products, target
from vispec.model.cache import CUDA_ALIGNMENT, TreeCache
from vispec.model.graphs import Steps

CAPTURED_BUCKET = 16


def pytest_unconfigure():
    """Remembered kernels go with the session: those of each of pytest-xdist's processes."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture
def aligned(monkeypatch):
    """Caches on the CPU give attention as many slots as those of a GPU do, of which the last ones hold nothing."""
    init = TreeCache.__init__

    def as_on_cuda(self, layer_devices, batch_size, capacity):
        init(self, layer_devices, batch_size, -(-capacity // CUDA_ALIGNMENT) * CUDA_ALIGNMENT)
        self._alignment = CUDA_ALIGNMENT

    monkeypatch.setattr(TreeCache, "__init__", as_on_cuda)


@pytest.fixture
def captures(monkeypatch) -> Iterator[Counter]:
    """Steps are captured on the CPU, in small buckets; counts how often each key was."""
    found = Counter()
    run = Steps.run

    def count(self, *args):
        before = set(self._replays)
        value = run(self, *args)
        found.update(self._replays.keys() - before)
        return value

    monkeypatch.setattr(target, "obstacle", lambda *_: None)
    monkeypatch.setattr(graphs, "cuda_capture", lambda device: record)
    monkeypatch.setattr(Steps, "run", count)
    monkeypatch.setattr(decoding, "BUCKET", CAPTURED_BUCKET)
    recorded_model.cache_clear()  # a target remembers whether it can be captured
    yield found
    recorded_model.cache_clear()


@pytest.fixture
def eager(monkeypatch) -> set:
    """Keys of steps that were run as they are, without the replay of a capture from before."""
    found, run = set(), Steps.run

    def watched(self, key, *args):
        if key not in self._replays:
            found.add(key)
        return run(self, key, *args)

    monkeypatch.setattr(Steps, "run", watched)
    return found


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """Lets one kernel win all measurements; it is to be one that works here."""

    def choose(name: str) -> None:
        if not products._has(name, torch.float32):
            pytest.skip(f"this PyTorch has no {name}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        monkeypatch.setattr(products, "_measure", lambda alike, rows, names: name if name in names else "linear")

    return choose
