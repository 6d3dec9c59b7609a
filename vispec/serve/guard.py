"""What stands before every request: its id, the key, limits of time and size, and the access log."""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11
from fastapi.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from vispec.serve.metrics import Metrics
from vispec.serve.protocol import ApiError

logger = logging.getLogger("vispec.serve.access")

REQUEST_ID = b"x-request-id"
OPEN = ("/", "/health")
"""What needs no key."""
HEADER_SECONDS = 10.0
"""In which a client has to have sent the head of a request, from its connection or the head's first bytes on."""


@dataclass(frozen=True)
class HttpLimits:
    """Of requests."""

    body_bytes: int = 32 * 2**20
    body_seconds: float = 60.0
    api_key: str | None = None
    """None: everybody may ask."""
    hosts: frozenset[str] | None = None
    """Names by which clients may call the server; None: any."""
    proxied: bool = False
    """Behind a proxy that gives each request its id, and tells it the client."""


class Guard:
    """An ASGI application before another one."""

    def __init__(self, app, limits: HttpLimits, metrics: Metrics):
        self._app, self._limits, self._metrics = app, limits, metrics

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        proxied = self._limits.proxied
        start, name, status = time.monotonic(), _given_id(scope) if proxied else f"req_{uuid.uuid4().hex}", 500

        async def answer(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not proxied:
                    message["headers"] = [*message.get("headers", ()), (REQUEST_ID, name.encode())]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, self._limited(receive), answer)
            else:
                await json_response(refusal.body(), refusal.status)(scope, receive, answer)
        finally:
            self._metrics.answered(status)
            client = (scope.get("client") or ["-"])[0]
            seconds = time.monotonic() - start
            logger.info("%s %s %s %s %d %.3f s", name, client, scope["method"], ascii(scope["path"]), status, seconds)

    def _refusal(self, scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if refusal := self._foreign(headers):
            return refusal
        key = self._limits.api_key
        if key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + key.encode()):
                return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            return self._too_large()
        return None

    def _foreign(self, headers: Mapping[bytes, bytes]) -> ApiError | None:
        """Pages of other hosts, which a browser lets ask a server of its own machine, are not answered."""
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        try:
            called, page = urlsplit(f"//{host}").hostname, urlsplit(origin).netloc
        except ValueError:
            called, page = None, None
        if self._limits.hosts is not None and called not in self._limits.hosts:
            return ApiError(403, f"the server is not called {host!r} here", code="forbidden_host")
        if origin and page != host:
            return ApiError(403, f"a page of {origin!r} may not ask", code="forbidden_origin")
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._limits.body_bytes:,} bytes", code="request_too_large")

    def _limited(self, receive):
        """`receive` that raises ApiError for a body that is too large or comes too slowly."""
        left, deadline, whole = self._limits.body_bytes, time.monotonic() + self._limits.body_seconds, False

        async def limited():
            nonlocal left, whole
            if whole:  # what follows is that the client hangs up, at any time
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0))
            except asyncio.TimeoutError:
                raise ApiError(408, f"the body was not there after {self._limits.body_seconds:g} seconds") from None
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large()
            whole = not message.get("more_body", False)
            return message

        return limited


def _given_id(scope) -> str:
    return ascii(dict(scope["headers"]).get(REQUEST_ID, b"-").decode("latin-1"))[1:-1]


class HeaderTimeout(H11Protocol):
    """Uvicorn's protocol, which by itself waits for a request's head for as long as a client likes."""

    _waits: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._waits is not None:
            self._waits.cancel()

    def _wait_for_head(self) -> None:
        begun = self.conn.their_state is not h11.IDLE
        if begun and self._waits is not None:
            self._waits.cancel()
            self._waits = None
        elif not begun and self._waits is None:
            self._waits = self.loop.call_later(HEADER_SECONDS, self.transport.close)


def json_response(content: dict, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """In ASCII, since halves of surrogate pairs, which a client may send, have no other encoding."""
    return Response(json.dumps(content), status, headers, media_type="application/json")
