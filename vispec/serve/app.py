"""The server's addresses."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vispec.serve.answers import Answers, event
from vispec.serve.engine import Ask, QueueFull, Told
from vispec.serve.guard import Guard, HttpLimits, json_response
from vispec.serve.page import page
from vispec.serve.protocol import ApiError, parse_request
from vispec.serve.service import Service

RETRY_AFTER = "1"
"""Seconds after which a client may try again when the queue was full."""
GONE = 499
"""Status, for the log, of a request whose client has hung up."""


def make_app(
    service: Service, limits: HttpLimits, all_metrics: Callable[[], Awaitable[str]] | None = None
) -> Guard:
    """The server as ASGI takes it.

    Args:
        all_metrics: what /metrics says where the server is one of several.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        service.engine.start()
        yield
        await asyncio.to_thread(service.engine.stop)

    preparing = asyncio.Semaphore(service.limits.waiting)
    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_address)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _fail)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked_at = time.monotonic()
        asked = parse_request(_json(await request.body()))
        told: asyncio.Queue[tuple[int, Told]] = asyncio.Queue()
        if preparing.locked():  # so many wait for their turn to become a prompt
            raise QueueFull
        async with preparing:
            tell = _telling(asyncio.get_running_loop(), told)
            asks = await asyncio.to_thread(service.prepare, asked, asked_at, tell)
        if await request.is_disconnected():  # others would wait while its prompt is read
            return Response(status_code=GONE)
        service.engine.submit(asks)
        answers = Answers(asked, asks)
        if asked.stream:
            return StreamingResponse(_stream(service, asks, answers, told), media_type="text/event-stream")
        return await _whole(service, asks, answers, told, request)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != service.name:
            raise ApiError(404, f"the model {name!r} is not here, found {service.name!r}", "model", "model_not_found")
        return json_response(_model(service))

    app.add_api_route("/", page)

    @app.get("/health")
    async def health() -> Response:
        alive = service.engine.alive
        return json_response({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = await all_metrics() if all_metrics else service.metrics.text()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return Guard(app, limits, service.metrics)


async def _refuse(request: Request, error: ApiError) -> Response:
    headers = {"Retry-After": RETRY_AFTER} if error.status in (429, 503) else None
    return json_response(error.body(), error.status, headers)


async def _refuse_address(request: Request, error: HTTPException) -> Response:
    reason = f"{request.method} {request.url.path}: {error.detail}"
    return json_response(ApiError(error.status_code, reason).body(), error.status_code, error.headers)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=GONE)


async def _fail(request: Request, error: Exception) -> Response:
    return json_response(ApiError(500, f"{type(error).__name__} on the server").body(), 500)


def _json(body: bytes):
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None


def _telling(loop: asyncio.AbstractEventLoop, told: asyncio.Queue):
    """From the engine's thread into the queue of a request."""

    def tell(number: int, one: Told) -> None:
        try:
            loop.call_soon_threadsafe(told.put_nowait, (number, one))
        except RuntimeError:  # the loop has ended, and with it all who wait
            pass

    return tell


async def _whole(
    service: Service, asks: list[Ask], answers: Answers, told: asyncio.Queue, request: Request
) -> Response:
    async def collect() -> None:
        while not answers.done:
            answers.add(*await told.get())

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    collecting, gone = asyncio.create_task(collect()), asyncio.create_task(hung_up())
    try:
        await asyncio.wait({collecting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=GONE)
        await collecting
        return json_response(answers.whole())
    finally:
        collecting.cancel(), gone.cancel()
        _cancel(service, asks)


async def _stream(service: Service, asks: list[Ask], answers: Answers, told: asyncio.Queue) -> AsyncIterator[str]:
    try:
        yield answers.first_chunks()
        while not answers.done:
            if chunks := answers.chunks(*await told.get()):
                yield chunks
        yield answers.last_chunks()
    except ApiError as error:
        yield event(error.body())
    finally:
        _cancel(service, asks)


def _cancel(service: Service, asks: list[Ask]) -> None:
    """Of answers that have ended this says nothing."""
    for ask in asks:
        service.engine.cancel(ask)


def _model(service: Service) -> dict:
    """`drafts` is ours: whether there is a draft to compare plain decoding with."""
    ours = {"drafts": service.drafts}
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "vispec"} | ours
