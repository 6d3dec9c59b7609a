"""What replicas of the server share, without Ray; `make test-replicas` has them on a cluster."""

import logging
import sys
from types import SimpleNamespace

import pytest
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient

from vispec.serve.__main__ import main
from vispec.serve.guard import Guard, HttpLimits
from vispec.serve.metrics import Metrics, together
from vispec.serve.replicas import Replica, shared_cores


@pytest.mark.parametrize(
    ("flags", "missing", "reason"),
    [
        ((), "ray", r"--replicas: .* need Ray: pip install 'vispec\[ray\]'"),
        ((), "ray.serve", r"--replicas: .* need Ray: pip install 'vispec\[ray\]'"),
        (("--port", "0"), None, "--replicas: .* a port, found --port 0"),
    ],
)
def test_replicas_need_ray_serve_and_a_port(monkeypatch, flags, missing, reason):
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=reason):
        main(["--replicas", "2", *flags])


def test_a_cluster_that_does_not_answer_is_named(monkeypatch):
    def init(**options):
        raise ConnectionError("Failed to connect to Ray cluster at 192.0.2.1:6379")

    monkeypatch.setitem(sys.modules, "ray.serve", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    with pytest.raises(ValueError, match="--replicas: Failed to connect to .* at 192.0.2.1:6379; `ray stop` forgets"):
        main(["--replicas", "2"])


@pytest.mark.parametrize(
    ("cores", "replicas", "each"), [([2], 2, 1), ([2], 3, 0), ([5, 3], 3, 2), ([8, 1], 2, 4), ([0], 1, 0)]
)
def test_replicas_share_the_cores(cores, replicas, each):
    assert shared_cores([{"CPU": float(number)} for number in cores], replicas) == each


def test_a_replica_that_decodes_no_more_is_not_healthy():
    engine = SimpleNamespace(alive=True)
    replica = SimpleNamespace(_service=SimpleNamespace(engine=engine))
    Replica.check_health(replica)
    engine.alive = False
    with pytest.raises(RuntimeError, match="thread has ended"):
        Replica.check_health(replica)


def test_metrics_of_replicas_are_told_apart():
    told = {}
    for name, status in (("a", 200), ("b", 429)):
        metrics = Metrics()
        metrics.answered(status)
        metrics.told(3, 2, 1, 0.1, 7, 0)
        told[name] = metrics.text()
    lines = together(told).splitlines()
    assert len(lines) == len(set(lines))
    assert [line for line in lines if line.startswith("vispec_requests_total{")] == [
        'vispec_requests_total{replica="a",status="200"} 1',
        'vispec_requests_total{replica="b",status="429"} 1',
    ]
    first = lines.index("# TYPE vispec_prompt_tokens_total counter")
    assert lines[first + 1 : first + 3] == [f'vispec_prompt_tokens_total{{replica="{name}"}} 7' for name in "ab"]
    assert 'vispec_first_token_seconds_bucket{replica="b",le="+Inf"} 1' in lines


@pytest.mark.parametrize("proxied", [False, True])
def test_a_request_has_one_id(caplog, proxied):
    caplog.set_level(logging.INFO)
    client = TestClient(Guard(PlainTextResponse("hello"), HttpLimits(proxied=proxied), Metrics()))
    found = client.get("/", headers={"x-request-id": "given"})
    assert ("x-request-id" in found.headers) is not proxied
    assert ("given " in caplog.text) is proxied
