"""What stands between HTTP and the engine: from a request to answers that are being made."""

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vispec.cli import one_line
from vispec.prompts import build_inputs
from vispec.serve.conversation import conversation
from vispec.serve.engine import Ask, Engine, Told
from vispec.serve.logprobs import TokenLogprobs
from vispec.serve.metrics import Metrics
from vispec.serve.pictures import PictureLimits
from vispec.serve.processors import Grammars, processors_of
from vispec.serve.protocol import ApiError, ChatRequest
from vispec.serve.text import StoppedText, TokenTexts

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from vispec.model.spec_model import SpecModel

PLAIN_ROWS = 1
"""Of the batch without a draft, where there is one with a draft: it is there to be compared with."""


@dataclass(frozen=True)
class ServiceLimits:
    """What is taken at a time."""

    batch: int = 8
    """Answers that are made together."""
    tokens: int = 8 * 4096
    """Of all rows of the batch together, prompts included."""
    waiting: int = 64
    """Answers in the queue."""
    seconds: float = 600.0
    """For an answer, from the request on."""
    pictures: PictureLimits = PictureLimits(pixels=16_000_000, images=16)

    @property
    def share(self) -> int:
        """Tokens of one row."""
        return self.tokens // self.batch


class Service:
    """A model that answers requests.

    Args:
        name: by which clients call it.
    """

    def __init__(self, model: "SpecModel", processor: "ProcessorMixin", name: str, limits: ServiceLimits):
        self.name, self.limits, self.created = name, limits, int(time.time())
        self._processor, self._reading = processor, threading.Lock()
        # tokenizers are not made for several threads: what decodes has a copy of its own
        self._tokenizer = copy.deepcopy(processor.tokenizer)
        self._texts = TokenTexts(self._tokenizer)
        self._grammars = Grammars(copy.deepcopy(processor.tokenizer))
        self.drafts = model.draft is not None
        self._batches = {self.drafts: model.open_batch(limits.batch, limits.share, self.drafts)}
        self._most_characters = self._batches[self.drafts].tokens * max(map(len, self._tokenizer.get_vocab()))
        if self.drafts:
            self._batches[False] = model.open_batch(PLAIN_ROWS, limits.share, False)
        self.metrics = Metrics()
        self.engine = Engine(self._batches, limits.waiting, self.metrics)

    def prepare(self, request: ChatRequest, asked_at: float, tell: Callable[[int, Told], None]) -> list[Ask]:
        """Read the request's pictures and build its prompt; takes its time, and may run in several threads.

        Args:
            asked_at: by time.monotonic().
            tell: called in the engine's thread with the number of an answer and what has been added to it.

        Raises:
            ApiError: the request cannot be answered.
        """
        if request.model != self.name:
            raise ApiError(
                404, f"the model {request.model!r} is not here, found {self.name!r}", "model", "model_not_found"
            )
        if (found := sum(one.characters for one in request.messages)) > self._most_characters:
            # a tokenizer takes minutes, and gigabytes, for what is sure to be refused
            reason = f"{found:,} characters have more tokens than there is room for"
            raise ApiError(400, reason, "messages", "context_length_exceeded")
        torch.set_num_threads(1)  # of this one: the cores are the decoding thread's
        answers = request.n or 1
        if answers > self.limits.waiting:
            raise ApiError(400, f"n: {answers} answers are more than the queue's {self.limits.waiting}", "n")
        turns, system = conversation(request.messages, self.limits.pictures)
        try:
            with self._reading:  # one by one, also because decoded pictures are large
                inputs = build_inputs(self._processor, turns, system)
            return [self._ask(request, inputs, number, asked_at, tell) for number in range(answers)]
        except ValueError as error:
            raise self._refused(error) from None

    def _ask(self, request: ChatRequest, inputs, number: int, asked_at: float, tell: Callable) -> Ask:
        from vispec.model.sampling import Sampling

        speculate = request.speculate and self.drafts
        # the likeliest token alone is within a top_p of 0
        temperature = 0.0 if request.top_p == 0 else 1.0 if request.temperature is None else request.temperature
        joining = self._batches[speculate].prepare(
            **inputs,
            max_new_tokens=request.max_completion_tokens or request.max_tokens,
            sampling=Sampling(temperature, request.top_p or 0.0, request.top_k or 0),
            seed=None if request.seed is None else request.seed + number,
            processors=processors_of(request, inputs["input_ids"].shape[1], self._grammars),
            keeps_logits=bool(request.logprobs),
        )
        text, deadline = StoppedText(self._tokenizer, request.stops), asked_at + self.limits.seconds
        logprobs = None
        if request.logprobs:
            logprobs = TokenLogprobs(self._texts, request.top_logprobs or 0, joining.stop.eos_token_ids)
        return Ask(joining, text, lambda told: tell(number, told), deadline, speculate, logprobs, asked_at)

    def _refused(self, error: ValueError) -> ApiError:
        from vispec.model.joining import TooLong

        if not isinstance(error, TooLong):
            return ApiError(400, one_line(error), "messages", "invalid_value")
        # or the target has no more positions
        shares = self._batches[self.drafts].tokens == self.limits.share
        cause = " (the server's --max-tokens-total by its --max-batch)" if shares else ""
        return ApiError(400, one_line(error) + cause, "messages", "context_length_exceeded")
