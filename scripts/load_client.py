"""A request to /v1/chat/completions as its client sees it, whole or streamed."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import httpx

from vispec.timing import now

PATH = "/v1/chat/completions"
LONGEST_SECONDS = 660.0
"""For which a client waits for bytes: longer than the server, by default, for an answer."""


Place = Literal["in the body", "before the answer", "in the answer"]


@dataclass(frozen=True)
class HangUp:
    """When a client leaves."""

    place: Place
    share: float
    """From 0 to 1: of the body's bytes, of WAITS seconds, of WATCHES events."""

    WAITS, WATCHES = 0.3, 16


@dataclass
class Choice:
    """One of the answers to a request."""

    text: str = ""
    finish: str | None = None
    logprobs: list[dict] = field(default_factory=list)


@dataclass
class Reply:
    """What has come of a request."""

    asked_at: float = field(default_factory=now)
    status: int | None = None
    """None: the client left before there was one."""
    choices: dict[int, Choice] = field(default_factory=lambda: defaultdict(Choice))
    usage: Mapping | None = None
    error: str | None = None
    refused: int = 0
    """Times that the queue was full (429), each followed by another try when Retry-After says."""
    first_at: float | None = None
    """When the first text came; None: there was none."""
    ended_at: float | None = None
    whole: bool = False
    """Whether it ended as it should, and not with an error or because a side hung up."""

    def add(self, content: Mapping) -> None:
        """A whole answer, one chunk of it, or an error."""
        if "error" in content:
            self.error = content["error"]["message"]
        for one in content.get("choices", ()):
            choice, said = self.choices[one["index"]], one.get("message") or one["delta"]
            if said.get("content") and self.first_at is None:
                self.first_at = now()
            choice.text += said.get("content") or ""
            choice.finish = one["finish_reason"] or choice.finish
            choice.logprobs += (one["logprobs"] or {}).get("content") or ()
        self.usage = content.get("usage") or self.usage


async def ask(http: httpx.AsyncClient, content: bytes, leaves: HangUp | None = None, **options) -> Reply:
    """Ask once, and once more whenever the queue was full.

    Args:
        options: method, url and headers, where they are others than usual.
    """
    reply = Reply()
    request = {"method": "POST", "url": PATH, "headers": {"Content-Type": "application/json"}} | options
    patience = HangUp.WAITS * leaves.share if leaves and leaves.place == "before the answer" else None
    try:
        while wait := await asyncio.wait_for(_ask_once(http, request, content, leaves, reply), patience):
            reply.refused += 1
            await asyncio.sleep(wait)
    except (asyncio.TimeoutError, _Left):
        pass
    except (httpx.HTTPError, KeyError, ValueError) as error:  # the last two: of what is no answer of this API
        reply.error = f"{type(error).__name__}: {error}"
    reply.ended_at = now()
    return reply


class _Left(Exception):
    """The client has hung up."""


async def _ask_once(
    http: httpx.AsyncClient, request: dict, content: bytes, leaves: HangUp | None, reply: Reply
) -> float | None:
    """Returns the seconds after which to try again."""
    if leaves is not None and leaves.place == "in the body":
        length = {"Content-Length": str(len(content))}
        request = request | {"headers": request["headers"] | length}
        content = _beginning(content[: int(len(content) * leaves.share)])
    events = HangUp.WATCHES * leaves.share if leaves is not None and leaves.place == "in the answer" else float("inf")
    async with http.stream(**request, content=content) as answer:
        if answer.status_code == 429:
            return float(answer.headers["Retry-After"])
        reply.status = answer.status_code
        if not answer.headers["Content-Type"].startswith("text/event-stream"):
            reply.add(json.loads(await answer.aread()))
            reply.whole = reply.error is None
            return None
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                reply.whole = reply.error is None
            elif line:
                reply.add(json.loads(line.removeprefix("data: ")))
                events -= 1
            if events <= 0:
                raise _Left
    return None


async def _beginning(content: bytes) -> AsyncIterator[bytes]:
    yield content
    await asyncio.sleep(HangUp.WAITS / 10)  # until the server reads it
    raise _Left
