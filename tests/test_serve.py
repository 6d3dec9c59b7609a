"""The server as its clients see it: OpenAI's own client, and plain requests, of a server on a free port."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from PIL import Image
from served import KEY, NAME, Served, data_url, expected, message, questions

from vispec import embedded
from vispec.cli import UserError
from vispec.evaluation.loading import load_model
from vispec.prompts import build_inputs, load_processor, user_turn
from vispec.serve import __main__ as command
from vispec.serve import guard
from vispec.serve.__main__ import LOOPBACK, main
from vispec.serve.guard import HttpLimits
from vispec.serve.processors import OpenAIPenalties
from vispec.serve.service import Service, ServiceLimits


@pytest.fixture(scope="module")
def processor():
    return load_processor(str(embedded.TARGET))


@pytest.fixture(scope="module")
def model():
    return load_model(*embedded.require_weights(), dtype="float32", tree=embedded.TREE_NAME)


@pytest.fixture(scope="module")
def served(model, processor):
    limits = ServiceLimits(batch=2, tokens=2 * 400, waiting=8)
    served = Served(Service(model, processor, NAME, limits), HttpLimits(2**20, api_key=KEY, hosts=LOOPBACK))
    yield served
    served.close()


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)


def ask(client, *items, **options):
    options = {"model": NAME, "max_tokens": 40, "temperature": 0} | options
    return client.chat.completions.create(messages=[message(*items)], **options)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:80"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Host": "127.0.0.1", "Origin": "http://127.0.0.1"}, 200),
        ({"Host": "127.0.0.1:80", "Origin": "http://127.0.0.1:81"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Host": "[", "Origin": "http://["}, 403),
    ],
)
def test_pages_of_other_hosts_are_not_answered(served, headers, status):
    assert httpx.get(f"{served.url}/health", headers=headers).status_code == status


def post(served, **body) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": NAME, "messages": [{"role": "user", "content": "What?"}], "max_tokens": 5} | body
    return httpx.post(f"{served.url}/v1/chat/completions", content=json.dumps(body), headers=headers, timeout=60)


def test_greedy_answers_together_are_generates(client, model, processor):
    asked = questions(4)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda one: ask(client, *one), asked))
    for (image, text), answer in zip(asked, answers, strict=True):
        assert answer.choices[0].message.content == expected(model, processor, user_turn(image, text))
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.usage.rounds + answer.usage.accepted_draft_tokens + 1 >= answer.usage.completion_tokens


def test_a_stream_says_the_same(client):
    [(image, text)] = questions(1)
    whole = ask(client, image, text)
    chunks = list(ask(client, image, text, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == (
        whole.choices[0].message.content
    )
    pieces = [piece for one in chunks if one.choices for piece in getattr(one.choices[0], "pieces", [])]
    assert "".join(text for text, _ in pieces) == whole.choices[0].message.content
    assert {drafted for _, drafted in pieces} == {True, False}
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_without_a_draft_the_answer_is_the_same(client):
    [(image, text)] = questions(1)
    plain = ask(client, image, text, extra_body={"speculate": False})
    assert plain.usage.rounds == 0
    assert plain.choices[0].message.content == ask(client, image, text).choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_before_them(client, stream):
    [(image, text)] = questions(1)
    whole = ask(client, image, text).choices[0].message.content
    stop = whole[8:12]
    found = ask(client, image, text, stop=[stop, "never said"], stream=stream)
    if stream:
        found = [one.choices[0] for one in found]
        said = "".join(one.delta.content or "" for one in found)
    else:
        found = [found.choices[0]]
        said = found[0].message.content
    assert said == whole[: whole.find(stop)]
    assert found[-1].finish_reason == "stop"


def test_seeds_and_several_answers(client):
    options = {"temperature": 1.5, "seed": 3, "top_p": 0.95}
    two = ask(client, "Tell me a story.", n=2, **options)
    again = ask(client, "Tell me a story.", **options | {"seed": 4})
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[1].message.content == again.choices[0].message.content != two.choices[0].message.content


def test_logprobs_are_the_targets(client):
    answer = ask(client, "What is there?", logprobs=True, top_logprobs=2, max_tokens=6, temperature=1.5, seed=1)
    entries = answer.choices[0].logprobs.content
    assert 0 < len(entries) <= 6
    for entry in entries:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob <= entry.top_logprobs[0].logprob <= 0
    greedy = ask(client, "What is there?", logprobs=True, top_logprobs=1, max_tokens=6)
    assert all(one.logprob == one.top_logprobs[0].logprob for one in greedy.choices[0].logprobs.content)


def test_penalties_are_generates_and_openais(client, model, processor):
    [(image, text)] = questions(1)
    inputs = build_inputs(processor, [user_turn(image, text)], "")
    length = inputs["input_ids"].shape[1]
    for asked, options in (
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"presence_penalty": 1.5, "frequency_penalty": 2}, {"logits_processor": [OpenAIPenalties(1.5, 2, length)]}),
    ):
        ids = model.target.model.generate(**inputs, do_sample=False, max_new_tokens=30, **options)
        told = processor.tokenizer.decode(ids[0, length:], skip_special_tokens=True).lstrip()
        assert ask(client, image, text, max_tokens=30, extra_body=asked).choices[0].message.content == told


def test_openais_penalties():
    scores = OpenAIPenalties(0.5, 2, 2)(torch.tensor([[0, 0, 1, 3, 1]]), torch.zeros(1, 5))
    assert scores.tolist() == [[0, -4.5, 0, -2.5, 0]]


def test_json_follows_its_schema(client):
    names = {"open": {"type": "boolean"}}
    schema = {"type": "object", "properties": names, "required": ["open"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "state", "schema": schema}}
    [choice] = ask(client, "Is it open?", response_format=wanted, max_tokens=80).choices
    assert choice.finish_reason == "stop"
    assert json.loads(choice.message.content) in ({"open": True}, {"open": False})


def test_a_schema_that_cannot_be_followed_ends_its_own_answer_alone(client, caplog):
    schema = {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "nothing", "schema": schema}}
    stream = ask(client, "Tell me a story.", stream=True)
    next(iter(stream))
    with pytest.raises(openai.BadRequestError, match="response_format"):
        ask(client, "Tell me a secret.", response_format=wanted)
    assert list(stream)[-1].choices[0].finish_reason
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"temprature": 1}, 400, "temprature"),
        ({"temperature": 3}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 4000}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 10**5}]}, 400, "messages"),
        ({"model": "another"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, 400, "messages.0.role"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"stop": ["a", ""]}, 400, "stop"),
        ({"messages": [{"role": "user", "content": "<image> what?"}]}, 400, "messages"),
        ({"\ud800": 1}, 400, None),
    ],
)
def test_what_is_refused_is_named(served, body, status, param):
    answer = post(served, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert "\n" not in error["message"]
    assert ("--max-tokens-total" in error["message"]) == (body.get("max_tokens") == 4000)
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64,aGVsbG8=", "no picture"),
        ("data:image/png;base64,%%%", "base64"),
        ("file:///etc/passwd", "expected data:"),
        ("/etc/passwd", "expected data:"),
        ("http://127.0.0.1/x.png", "are not fetched"),
        (data_url(Image.new("RGB", (5000, 4000))), "pixels are more than"),
    ],
)
def test_broken_pictures_are_refused_in_one_line(served, url, reason):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    answer = post(served, messages=[{"role": "user", "content": content}])
    assert answer.status_code == 400
    assert reason in answer.json()["error"]["message"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("stream", [False, True])
def test_curl(served, client, stream):
    messages = [message("What is a tree?")]
    body = {"model": NAME, "temperature": 0, "max_tokens": 40, "stream": stream, "messages": messages}
    headers = ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    curl = ["curl", "-sSN", "--fail", f"{served.url}/v1/chat/completions", *headers, "-d", json.dumps(body)]
    found = subprocess.run(curl, capture_output=True, text=True, check=True).stdout
    if stream:
        *events, end = [line.removeprefix("data: ") for line in found.splitlines() if line]
        told = "".join(json.loads(one)["choices"][0]["delta"].get("content", "") for one in events)
        assert end == "[DONE]"
    else:
        told = json.loads(found)["choices"][0]["message"]["content"]
    assert told == ask(client, "What is a tree?").choices[0].message.content


def test_keys_sizes_and_addresses(served):
    url = f"{served.url}/v1/chat/completions"
    assert httpx.post(url, json={}).status_code == 401
    assert post(served, messages=[{"role": "user", "content": "a" * 2**20}]).status_code == 413
    key = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(url, content=b"{", headers=key).status_code == 400
    assert httpx.get(f"{served.url}/v1/none", headers=key).json()["error"]["message"].startswith("GET /v1/none")
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{served.url}/v1/models", headers=key).json()["data"][0]["id"] == NAME


def test_who_hangs_up_frees_a_row(served, client):
    stream = ask(client, "Tell me a story.", max_tokens=300, stream=True, temperature=2, seed=1)
    next(iter(stream))
    stream.close()
    with httpx.Client(timeout=0.3) as http:
        body = {"model": NAME, "messages": [message("Tell me.")], "max_tokens": 300, "temperature": 2, "seed": 1}
        with pytest.raises(httpx.ReadTimeout):
            http.post(f"{served.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    deadline = time.monotonic() + 5
    while served.service.engine._rows and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not served.service.engine._rows


def test_who_is_silent_is_hung_up_on(served, monkeypatch):
    monkeypatch.setattr(guard, "HEADER_SECONDS", 0.1)
    for begun in (b"", b"GET /health HTTP/1.1\r\n"):
        with socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1])), timeout=10) as connection:
            connection.sendall(begun)
            assert connection.recv(1) == b""


def test_who_hangs_up_within_a_request_is_no_error(served, caplog):
    caplog.set_level("INFO")
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        connection.sendall(f"{head}Content-Length: 9\r\n\r\n{{".encode())
        time.sleep(0.1)
    deadline = time.monotonic() + 5
    while " 499 " not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.02)
    assert " 499 " in caplog.text and "Traceback" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_of_who_has_hung_up_is_not_read(served, caplog, monkeypatch, stream):
    caplog.set_level("INFO")
    prepare, begun = served.service.prepare, []
    monkeypatch.setattr(served.service, "prepare", lambda *given: time.sleep(0.5) or prepare(*given))
    monkeypatch.setattr(served.service.engine, "submit", begun.append)
    with httpx.Client(timeout=0.2) as http, pytest.raises(httpx.ReadTimeout):
        body = {"model": NAME, "messages": [message("What?")], "stream": stream}
        http.post(f"{served.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    deadline = time.monotonic() + 5
    while " 499 " not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.02)
    assert " 499 " in caplog.text and not begun


def test_a_full_queue_and_a_deadline(model, processor):
    limits = ServiceLimits(batch=1, tokens=400, waiting=1, seconds=0.5)
    served = Served(Service(model, processor, NAME, limits), HttpLimits(api_key=KEY))
    try:
        body = {"max_tokens": 350, "temperature": 2.0, "seed": 1, "stop": ["\0"]}
        with ThreadPoolExecutor(5) as pool:
            answers = list(pool.map(lambda _: post(served, **body), range(5)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused and all(answer.headers["retry-after"] for answer in refused)
        assert {answer.status_code for answer in answers} <= {200, 429, 504}
    finally:
        served.close()
    assert not served.service.engine.alive


def test_answers_that_outlast_the_server_end_with_an_error(model, processor, monkeypatch):
    monkeypatch.setattr(command, "GRACE", 0.1)
    service = Service(model, processor, NAME, ServiceLimits(batch=1, tokens=4000))
    batch = service._batches[True]
    go_on = batch.round
    monkeypatch.setattr(batch, "round", lambda: time.sleep(0.05) or go_on())
    served = Served(service, HttpLimits(api_key=KEY))
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)
    stream = ask(client, "Tell me a story.", max_tokens=3900, stream=True, temperature=2, seed=1)
    next(iter(stream))
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(served.close)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        closing.result()


def test_metrics(served, client):
    ask(client, "What?", max_tokens=8)
    deadline, values = time.monotonic() + 5, {}
    while values.get("vispec_running_answers") != "0":
        assert time.monotonic() < deadline
        text = httpx.get(f"{served.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['vispec_requests_total{status="200"}']) >= 1
    assert 0 < float(values["vispec_tau"]) and 0 < float(values["vispec_accepted_share"]) < 1
    assert values["vispec_first_token_seconds_count"] == values['vispec_first_token_seconds_bucket{le="+Inf"}']


def test_the_command_serves_the_embedded_pair_until_it_is_told_to_end():
    command = [sys.executable, "-m", "vispec.serve", "--port", "0", "--max-batch", "1", "--tree", embedded.TREE_NAME]
    environment = {**os.environ, "VISPEC_API_KEY": KEY}
    with subprocess.Popen(
        [*command, "--prefix-cache", "100"], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        running = next(line for line in process.stderr if "running on" in line)
        client = openai.OpenAI(base_url=f"{running.split('running on ')[1].split()[0]}/v1", api_key=KEY)
        first, again = (ask(client, "What is there?", model="target", max_tokens=3).usage for _ in range(2))
        assert first.completion_tokens == 3
        assert again.prompt_tokens_details.cached_tokens == first.prompt_tokens - 1
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="another").models.list()
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--port"], "address already in use"),
        (["--host", ""], "--host is empty"),
        (["--api-key", ""], "--api-key is empty"),
        (["--allow-url", "https://pictures.example"], "expected the name of a host"),
    ],
)
def test_what_cannot_be_served_is_said_before_a_model_is_loaded(flags, reason):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = [str(taken.getsockname()[1])] if flags == ["--port"] else []
        with pytest.raises(UserError, match=reason):
            main([*flags, *port])
