"""Settings for all tests: no network, no noise, one thread (the models are tiny, more threads only cost)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so it has to come first
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch

from vispec.model.cache import CUDA_ALIGNMENT, TreeCache

torch.set_num_threads(1)


@pytest.fixture
def aligned(monkeypatch):
    """Caches on the CPU give attention as many slots as those of a GPU do, of which the last ones hold nothing."""
    init = TreeCache.__init__

    def as_on_cuda(self, layer_devices, batch_size, capacity):
        init(self, layer_devices, batch_size, -(-capacity // CUDA_ALIGNMENT) * CUDA_ALIGNMENT)
        self._alignment = CUDA_ALIGNMENT

    monkeypatch.setattr(TreeCache, "__init__", as_on_cuda)
