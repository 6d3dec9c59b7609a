"""A Ray cluster of this test's own, on this machine."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = {
    # Ray's own limits are short for a machine that is busy
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_worker_register_timeout_seconds": "600",
}


@contextmanager
def running_cluster(cores: Sequence[int], *loaded_first: Path) -> Iterator[None]:
    """A cluster that Ray will connect to.

    Args:
        cores: of each of its machines.
        loaded_first: folders of Python files before those of this repository.
    """
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # of its own, so that no other cluster of this machine is found or hidden; paths of sockets have to be short
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    path = os.pathsep.join(map(str, [*loaded_first, ROOT]))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SETTINGS, "PYTHONPATH": path, "RAY_TMPDIR": folder}.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores[0], "include_dashboard": False})
        for more in cores[1:]:
            cluster.add_node(num_cpus=more)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield
        cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
