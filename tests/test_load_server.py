"""The script that loads the server: what it takes as right and wrong, and a few of its requests."""

import asyncio
import importlib
import json
import logging
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from served import NAME, Served

from vispec import embedded
from vispec.evaluation.loading import load_model
from vispec.prompts import load_processor
from vispec.serve.engine import Ask
from vispec.serve.guard import HttpLimits
from vispec.serve.service import Service, ServiceLimits

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def load():
    """The script's modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield SimpleNamespace(
            **{name: importlib.import_module(f"load_{name}") for name in ("client", "mixed", "server")}
        )


@pytest.fixture(scope="module")
def alone(load):
    model = load_model(*embedded.require_weights(), dtype="float32", tree=embedded.TREE_NAME)
    return load.mixed.Alone(model, load_processor(str(embedded.TARGET)))


@pytest.fixture(scope="module")
def served(load, alone):
    limits = ServiceLimits(batch=4, tokens=4 * 1024, waiting=64, pictures=load.mixed.LIMITS)
    served = Served(Service(alone.model, alone.processor, NAME, limits), HttpLimits(load.mixed.BODY_BYTES))
    yield served
    served.close()


def test_mixed_requests_come_out_right(load, served, alone, monkeypatch, caplog, capsys):
    monkeypatch.setattr(load.mixed, "SPOILT_SHARE", 0.5)
    monkeypatch.setattr(load.mixed, "MOST_TOKENS", 8)
    memory = iter((1000, 1100))
    args = load.server.parse(["--mixed", "20"])
    server = SimpleNamespace(url=served.url, memory=lambda: next(memory))
    assert asyncio.run(load.server.check(server, args, alone)) == ["the server's memory went from 1,000 to 1,100 KiB"]
    printed = capsys.readouterr().out
    assert "24 requests: " in printed and "hangs up in the body" in printed
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_all_that_is_broken_is_refused_for_its_reason(load, served, alone):
    cases = list(load.mixed.broken(load.mixed.answerable(random.Random(0), NAME)))

    async def ask_all():
        async with load.server.connected(served.url) as http:
            return await load.server.ask_all(http, cases, "asking")

    replies = asyncio.run(ask_all())
    assert [fault for pair in zip(cases, replies, strict=True) for fault in load.mixed.faults(*pair, alone)] == []
    assert {reply.status for reply in replies} == {400, 403, 404, 405, 413}


def test_wrong_answers_are_faults(load):
    """Each reply differs from the right one in one thing."""
    mixed, client = load.mixed, load.client
    right = mixed.Answer("One two.", "stop", 4, [-0.5, -0.25, -1.0])
    alone = SimpleNamespace(answers=lambda body: [right])
    body = {"logprobs": True}
    whole = mixed.Case("answered", body, b"")

    def reply(text="One two.", finish="stop", logprobs=(-0.5, -0.25, -1.0), tokens=4, **changed):
        choice = client.Choice(text, finish, [{"logprob": one} for one in logprobs])
        found = {"status": 200, "choices": {0: choice}, "usage": {"completion_tokens": tokens}, "whole": True}
        return client.Reply(**found | changed)

    assert list(mixed.faults(whole, reply(), alone)) == []
    for wrong in (
        reply("One two"), reply(finish="length"), reply(logprobs=(-0.5, -0.25, -1.1)), reply(logprobs=(-0.5, -0.25)),
        reply(tokens=5), reply(usage=None), reply(whole=False), reply(choices={}), reply(status=500, error="It broke"),
    ):  # fmt: skip
        assert len(list(mixed.faults(whole, wrong, alone))) >= 1, wrong

    left = mixed.Case("hangs up", body, b"", leaves=client.HangUp("in the answer", 0.5))
    assert list(mixed.faults(left, reply("One", None, (), whole=False), alone)) == []
    assert list(mixed.faults(left, client.Reply(), alone)) == []
    assert len(list(mixed.faults(left, reply("Two", None, (), whole=False), alone))) == 1
    assert len(list(mixed.faults(left, reply(status=503, error="stopping"), alone))) == 1

    broken = mixed.Case("nothing", None, b"", 400, "not JSON")
    assert list(mixed.faults(broken, reply(status=400, error="the body is not JSON"), alone)) == []
    for wrong in (reply(status=500, error="the body is not JSON"), reply(status=400, error="no"), reply()):
        assert len(list(mixed.faults(broken, wrong, alone))) == 1


def test_the_table(load):
    def reply(first, ended, tokens, **changed):
        usage = {"completion_tokens": tokens, "rounds": tokens // 2, "accepted_draft_tokens": tokens // 4}
        found = {"asked_at": 1.0, "first_at": first, "ended_at": ended, "usage": usage, "whole": True}
        return load.client.Reply(**found | changed)

    fast = load.server.Window(2.0, [reply(1.25, 2.0, 40), reply(1.75, 3.0, 80), reply(None, 2.0, 8, whole=False)])
    slow = load.server.Window(2.0, [reply(2.0, 4.0, 40, usage={"completion_tokens": 40, "rounds": 0}, refused=3)])
    _, _, first, second = load.server.table({(4, "draft"): fast, (4, "plain"): slow}).splitlines()
    assert first == "| 4 | draft | 2 | 60.0 | 3.00 | 0.500 / 0.745 | 1.500 / 1.990 | 0.50 | 0 | 1 |"
    assert second == "| 4 | plain | 1 | 20.0 | 1.00 | 1.000 / 1.000 | 3.000 / 3.000 | - | 3 | 0 |"


def test_what_ends_within_the_window_counts(load, served, monkeypatch, capsys):
    """By a clock that goes on with each answer."""
    ask, ended = load.server.ask, []

    async def timed(*args):
        reply = await ask(*args)
        ended.append(len(ended) + 1.0)
        reply.asked_at, reply.first_at, reply.ended_at = 0.0, 0.0, ended[-1]
        return reply

    monkeypatch.setattr(load.server, "ask", timed)
    monkeypatch.setattr(load.server, "now", lambda: float(len(ended)))
    options = ["--clients", "3", "--seconds", "6", "--max-new-tokens", "2"]
    assert load.server.main(["--url", served.url, *options]) == 0
    [row] = capsys.readouterr().out.splitlines()[2:]
    clients, arm, answers, speed, *_, errors = (cell.strip() for cell in row.split("|")[1:-1])
    assert (clients, arm, answers, speed, errors) == ("3", "--url", "6", "2.0", "0")
    assert len(ended) >= 3 + 6


def test_a_full_queue_is_asked_again(load, monkeypatch):
    answers = iter((2.5, 0.5, None))

    async def once(*args):
        return next(answers)

    async def sleep(seconds):
        waited.append(seconds)

    waited = []
    monkeypatch.setattr(load.client, "_ask_once", once)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert asyncio.run(load.client.ask(None, b"")).refused == 2 and waited == [2.5, 0.5]


def test_requests_are_told_apart_by_themselves():
    """A plain one may wait behind another one, and is taken out of the queue from there."""
    asks = [Ask(torch.zeros(1, length), None, print, 0.0) for length in (2, 3)]
    assert asks.index(asks[1]) == 1


def test_questions_are_the_same_for_every_server(load):
    first, second, other = (
        json.dumps(load.mixed.simple_question(random.Random(seed), NAME, True, 8)) for seed in (1, 1, 2)
    )
    assert first == second != other
