"""Two replicas of the server on the two machines of a Ray cluster, one of which is killed while it answers.

This takes a minute: `make test-replicas` runs it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from clusters import running_cluster
from served import KEY, NAME, expected, message, questions

from vispec import embedded
from vispec.evaluation.loading import load_model
from vispec.prompts import load_processor, user_turn
from vispec.serve.__main__ import main

if "VISPEC_TEST_REPLICAS" not in os.environ:
    pytest.skip("replicas on a Ray cluster: make test-replicas", allow_module_level=True)

HEADERS = {"Authorization": f"Bearer {KEY}"}
STORY = {"messages": [message("Tell me a story.")], "temperature": 2, "stop": ["\0"], "max_tokens": 380}
FLAGS = ["--replicas", "2", "--max-batch", "4", "--max-tokens-total", "1600", "--max-queue", "8"]


class Server:
    """The command on a cluster."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        flags = [*FLAGS, "--served-model-name", NAME, "--port", str(self.port), "--tree", embedded.TREE_NAME]
        environment = {**os.environ, "VISPEC_API_KEY": KEY}
        command = [sys.executable, "-m", "vispec.serve", *flags, "--dtype", "float32"]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        assert any("2 of 2 replicas answer" in line for line in self.process.stderr)

    def ask(self, **body) -> httpx.Response:
        body = {"model": NAME, "temperature": 0, "max_tokens": 40} | body
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=120)

    def stream(self, **body) -> Iterator[str]:
        body = {"model": NAME, "stream": True} | body
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=120) as found:
            for line in found.iter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line.removeprefix("data: "))["choices"]
                    yield choices[0]["delta"].get("content") or ""

    def running(self) -> dict[str, int]:
        """Answers that are being made, by replica."""
        text = httpx.get(f"{self.url}/metrics", headers=HEADERS).text
        name = 'vispec_running_answers{replica="'
        found = (line.removeprefix(name).split('"} ') for line in text.splitlines() if line.startswith(name))
        return {replica: int(count) for replica, count in found}

    def wait_until_running(self, holds: Callable[[list[int]], bool]) -> dict[str, int]:
        deadline = time.monotonic() + 60
        while not holds(sorted((found := self.running()).values())):
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        return found


@pytest.fixture(scope="module")
def served():
    with running_cluster([1, 1]):
        server = Server()
        yield server
        server.process.kill()


def processes() -> list[psutil.Process]:
    """Of the replicas."""
    found = [one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
    return [one for one in found if "ServeReplica:vispec" in " ".join(one.cmdline())]


def test_replicas_on_both_machines_answer_as_one_server(served):
    assert len({one.ppid() for one in processes()}) == 2
    model = load_model(*embedded.require_weights(), dtype="float32")
    processor = load_processor(str(embedded.TARGET))
    asked = questions(4)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda one: served.ask(messages=[message(*one)]), asked))
    for (image, text), answer in zip(asked, answers, strict=True):
        told = expected(model, processor, user_turn(image, text))
        assert answer.json()["choices"][0]["message"]["content"] == told
    image, text = asked[0]
    told = answers[0].json()["choices"][0]["message"]["content"]
    assert "".join(served.stream(messages=[message(image, text)], temperature=0, max_tokens=40)) == told


def test_who_may_ask_is_the_same(served):
    assert httpx.post(f"{served.url}/v1/chat/completions", json={}).status_code == 401
    assert served.ask(model="another", messages=[message("What?")]).status_code == 404
    health = httpx.get(f"{served.url}/health")
    assert health.json() == {"status": "ok"} and len(health.headers.get_list("x-request-id")) == 1
    for headers in ({"Host": "rebound.example"}, {"Origin": "https://elsewhere.example"}):
        assert httpx.get(f"{served.url}/health", headers=headers).status_code == 403


def test_who_hangs_up_frees_a_row(served):
    stream = served.stream(**STORY, seed=1)
    next(piece for piece in stream if piece)
    served.wait_until_running(lambda counts: counts == [0, 1])
    stream.close()
    served.wait_until_running(lambda counts: counts == [0, 0])


def test_a_full_queue_says_when_to_try_again(served):
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda seed: served.ask(**STORY | {"max_tokens": 40}, seed=seed), range(40)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) >= 40 - 2 * (4 + 8 + 8) and all(answer.headers["retry-after"] for answer in refused)
    assert {answer.status_code for answer in answers} == {200, 429}


def test_a_killed_replica_loses_its_own_requests_and_comes_back(served):
    def whole(seed: int) -> str | None:
        answer = served.ask(**STORY, seed=seed)
        assert answer.status_code in (200, 500)
        return answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else None

    def streamed(seed: int) -> str | None:
        try:
            return "".join(served.stream(**STORY, seed=seed))
        except httpx.RemoteProtocolError:
            return None

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(whole if seed % 2 else streamed, seed) for seed in range(8)]
        before = served.wait_until_running(lambda counts: min(counts) > 0 and sum(counts) > 4)
        killed, kept = processes()
        os.kill(killed.pid, signal.SIGKILL)
        told = [one.result() for one in asked]
    lost = [seed for seed in range(8) if told[seed] is None]
    assert 0 < len(lost) < 8
    for seed in set(range(8)) - set(lost):
        assert told[seed] == whole(seed)
    after = served.wait_until_running(lambda counts: len(counts) == 2)
    assert len(before.keys() & after.keys()) == 1
    assert kept in processes() and killed not in processes()
    assert all(whole(seed) for seed in lost)


def test_one_server_a_cluster_which_it_leaves_running(served):
    with pytest.raises(ValueError, match="--replicas: Ray Serve runs on this cluster already, with vispec;"):
        main(["--replicas", "2", "--port", str(served.port)])
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(served.ask, **STORY, seed=1)
        served.wait_until_running(lambda counts: sum(counts) == 1)
        served.process.send_signal(signal.SIGTERM)
        assert answer.result().status_code == 200
    assert "Traceback" not in served.process.stderr.read() and served.process.wait() == 0
