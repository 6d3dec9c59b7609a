"""Continuous batches: one thread decodes, requests join between two rounds and leave when they end."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from vispec.cli import one_line
from vispec.serve.logprobs import TokenLogprobs
from vispec.serve.metrics import Metrics
from vispec.serve.protocol import ApiError
from vispec.serve.text import Piece, StoppedText

if TYPE_CHECKING:
    from vispec.model.joining import Joining, OpenBatch
    from vispec.model.rows import Round

logger = logging.getLogger("vispec.serve")

JOINING_TOKENS = 2048
"""Of prompts that are read between two rounds: answers that are being made wait meanwhile."""


class QueueFull(ApiError):
    """As many requests wait as may."""

    def __init__(self):
        super().__init__(429, "as many answers wait as may; try again later", code="rate_limit_exceeded")


class Stopping(ApiError):
    """No more requests are taken."""

    def __init__(self):
        super().__init__(503, "the server is stopping")


@dataclass
class Told:
    """What a round added to an answer."""

    pieces: list[Piece]
    logprobs: list[dict] = field(default_factory=list)
    """Of each token, where they were asked for."""
    finish: str | None = None
    """"stop" or "length", where the answer ends."""
    error: ApiError | None = None
    """Where it ends without being one."""


@dataclass(eq=False)  # one is itself alone: prompts, which are tensors, have no truth value of ==
class Ask:
    """A request for one answer, and what has become of it."""

    joining: "Joining"
    text: StoppedText
    tell: Callable[[Told], None]
    """Called in the decoding thread, which may not be held up."""
    deadline: float
    """By time.monotonic()."""
    speculate: bool = True
    logprobs: TokenLogprobs | None = None
    """Where they are asked for."""
    asked_at: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    reused: int = 0
    """Tokens of the prompt that were not read again."""
    tokens: int = 0
    accepted: int = 0
    """Draft tokens."""
    rounds: int = 0
    """With a draft."""
    told_at: float | None = None


class Engine:
    """Answers requests in a thread of its own.

    Args:
        batches: by whether they draft; closed when the engine is.
        most_waiting: requests in the queue beyond which `submit` refuses.
    """

    def __init__(self, batches: "dict[bool, OpenBatch]", most_waiting: int, metrics: Metrics):
        self._batches, self._most_waiting, self._metrics = batches, most_waiting, metrics
        self._waiting: deque[Ask] = deque()
        self._rows: dict[tuple[bool, int], Ask] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._cores = torch.get_num_threads()  # threads that prepare set theirs to one
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def submit(self, asks: list[Ask]) -> None:
        """Let answers to one request begin as soon as there is room.

        Raises:
            QueueFull, Stopping: none of them will.
        """
        with self._changed:
            if not self.alive:
                raise Stopping
            if len(self._waiting) + len(asks) > self._most_waiting:
                raise QueueFull
            self._waiting += asks
            self._show_load()
            self._changed.notify()

    def cancel(self, ask: Ask) -> None:
        """Nobody waits for this answer any more; its row is free with the next round."""
        ask.cancelled = True

    def end(self) -> None:
        """Let all answers end, with an error, and the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def stop(self, seconds: float = 10.0) -> None:
        """The same, and wait for it."""
        self.end()
        self._thread.join(seconds)

    # --- the decoding thread ---

    def _run(self) -> None:
        torch.get_num_threads()  # or what this thread sets is forgotten at its first product
        torch.set_num_threads(self._cores)
        try:
            while self._goes_on():
                self._drop()
                for speculate in self._batches:
                    self._admit(speculate)
                    self._round(speculate)
                self._show_load()
        finally:  # those who wait hear of it also where the thread breaks down
            with self._changed:
                self._stopping = True
            for ask in (*self._waiting, *self._rows.values()):
                _fail(ask, Stopping())
            for batch in self._batches.values():
                batch.close()

    def _goes_on(self) -> bool:
        """Wait until there is something to do; returns whether there is."""
        with self._changed:
            while not (self._stopping or self._waiting or self._rows):
                self._changed.wait()
            return not self._stopping

    def _drop(self) -> None:
        """Answers for which nobody waits, or that take too long, leave their rows or the queue."""
        now = time.monotonic()
        with self._changed:
            gone = [ask for ask in self._waiting if ask.cancelled or now > ask.deadline]
            for ask in gone:
                self._waiting.remove(ask)
        for (speculate, number), ask in list(self._rows.items()):
            if ask.cancelled or now > ask.deadline:
                self._batches[speculate].leave(number)
                del self._rows[speculate, number]
                gone.append(ask)
        for ask in gone:
            if not ask.cancelled:
                _fail(ask, ApiError(504, f"the answer was not there after {now - ask.asked_at:.0f} seconds"))

    def _admit(self, speculate: bool) -> None:
        """Requests join in their order: one, and more while their prompts are short together."""
        batch, room = self._batches[speculate], JOINING_TOKENS
        while not batch.full and (ask := self._next(speculate, room)) is not None:
            room -= ask.joining.length
            self._join(speculate, ask)

    def _next(self, speculate: bool, room: int) -> Ask | None:
        with self._changed:
            ask = next((ask for ask in self._waiting if ask.speculate == speculate), None)
            if ask is None or (room < JOINING_TOKENS and ask.joining.length > room):
                return None
            self._waiting.remove(ask)
            return ask

    def _join(self, speculate: bool, ask: Ask) -> None:
        try:
            number, first = self._batches[speculate].join(ask.joining)
        except ValueError as error:  # the target cannot read the prompt
            _fail(ask, ApiError(400, one_line(error), "messages", "invalid_value"))
        except Exception as error:
            self._report(error, [ask])
        else:
            self._rows[speculate, number] = ask
            self._go_on(speculate, number, first)

    def _round(self, speculate: bool) -> None:
        batch = self._batches[speculate]
        if not len(batch):
            return
        try:
            step = batch.round()
        except Exception as error:
            rows = {key: ask for key, ask in self._rows.items() if key[0] == speculate}
            for key in rows:
                batch.leave(key[1])
                del self._rows[key]
            self._report(error, list(rows.values()))
            return
        for number, one in step.items():
            self._go_on(speculate, number, one)

    def _go_on(self, speculate: bool, number: int, one: "Round") -> None:
        ask = self._rows[speculate, number]
        try:
            if one.error is not None:
                raise one.error
            ended = self._tell(ask, one)
        except ApiError as error:
            _fail(ask, error)
            ended = True
        except Exception as error:
            self._report(error, [ask])
            ended = True
        if ended:
            del self._rows[speculate, number]
            if not one.ended:  # at a stop string, of which the batch knows nothing
                self._batches[speculate].leave(number)

    def _tell(self, ask: Ask, one: "Round") -> bool:
        """Hand on what a round brought; returns whether the answer ends with it."""
        tokens, pieces = [], []
        for place, token in enumerate(one.tokens):
            tokens.append(token)
            pieces += ask.text.push(token, place < one.accepted)
            if ask.text.stopped:
                break
        finish = None
        if one.ended or ask.text.stopped:
            pieces += ask.text.finish()
            by_itself = ask.text.stopped or tokens[-1] in ask.joining.stop.eos_token_ids
            finish = "stop" if by_itself else "length"
        ask.reused += one.reused
        ask.tokens += len(tokens)
        ask.rounds += one.drafted
        ask.accepted += one.accepted
        logprobs = ask.logprobs.of(tokens, ask.joining.take_logits(len(tokens))) if ask.logprobs else []
        now, began = time.monotonic(), ask.told_at is None
        seconds, prompt = now - (ask.asked_at if began else ask.told_at), ask.joining.length if began else None
        self._metrics.told(len(tokens), one.levels, one.accepted, seconds, prompt, one.reused)
        ask.told_at = now
        ask.tell(Told(pieces, logprobs, finish))
        return finish is not None

    def _report(self, error: Exception, asks: list[Ask]) -> None:
        logger.exception("%d answers end with an error", len(asks), exc_info=error)
        for ask in asks:
            _fail(ask, ApiError(500, f"{type(error).__name__} while the answer was made"))

    def _show_load(self) -> None:
        self._metrics.show(len(self._waiting), len(self._rows))


def _fail(ask: Ask, error: ApiError) -> None:
    ask.tell(Told([], error=error))
