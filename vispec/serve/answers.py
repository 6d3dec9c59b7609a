"""Answers as OpenAI's clients read them, whole and in chunks."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from vispec.serve.engine import Ask, Told
from vispec.serve.protocol import ChatRequest

DONE = "data: [DONE]\n\n"


def event(content: dict) -> str:
    """One of server-sent events."""
    return f"data: {json.dumps(content)}\n\n"


def usage(asks: Sequence[Ask]) -> dict:
    """Of all answers to a request; `accepted_draft_tokens` and `rounds` are ours."""
    prompt, new = asks[0].joining.length, sum(ask.tokens for ask in asks)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": asks[0].reused},
        "accepted_draft_tokens": sum(ask.accepted for ask in asks),
        "rounds": sum(ask.rounds for ask in asks),
    }


@dataclass
class _Choice:
    text: str = ""
    logprobs: list[dict] = field(default_factory=list)
    finish: str | None = None


class Answers:
    """All answers to a request."""

    def __init__(self, request: ChatRequest, asks: Sequence[Ask]):
        self._asks, self._tells_logprobs, self._model = asks, bool(request.logprobs), request.model
        self._created, self._id = int(time.time()), f"chatcmpl-{uuid.uuid4().hex}"
        self._choices = [_Choice() for _ in asks]
        options = request.stream_options
        self._tells_usage = options is not None and options.include_usage

    @property
    def done(self) -> bool:
        return all(choice.finish for choice in self._choices)

    def add(self, number: int, told: Told) -> str:
        """The text that an answer has grown by.

        Raises:
            ApiError: it has ended without being one.
        """
        if told.error is not None:
            raise told.error
        choice, text = self._choices[number], "".join(text for text, _ in told.pieces)
        choice.text += text
        choice.logprobs += told.logprobs
        choice.finish = told.finish
        return text

    def whole(self) -> dict:
        """A chat.completion."""
        return {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": number,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.logprobs),
                    "finish_reason": choice.finish,
                }
                for number, choice in enumerate(self._choices)
            ],
            "usage": usage(self._asks),
        }

    def first_chunks(self) -> str:
        """Events that say whose answers they are."""
        role = {"role": "assistant", "content": "", "refusal": None}
        return "".join(self._chunk(number, role) for number in range(len(self._asks)))

    def chunks(self, number: int, told: Told) -> str:
        """Events of what an answer has grown by."""
        text, events = self.add(number, told), ""
        if text or told.logprobs:
            events += self._chunk(number, {"content": text}, self._logprobs(told.logprobs), pieces=told.pieces)
        if told.finish:
            events += self._chunk(number, {}, finish=told.finish)
        return events

    def last_chunks(self) -> str:
        counted = {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(self._asks)}
        return (event(counted) if self._tells_usage else "") + DONE

    def _chunk(self, number: int, delta: dict, logprobs: dict | None = None, finish: str | None = None, **ours) -> str:
        """`ours`: pieces, the text as [text, whether the draft had it right]."""
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish, **ours}
        content = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return event(content | {"usage": None} if self._tells_usage else content)

    def _logprobs(self, entries: list[dict]) -> dict | None:
        return {"content": entries, "refusal": None} if self._tells_logprobs else None

    def _head(self, kind: str) -> dict:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}
