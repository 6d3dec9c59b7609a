"""Requests as OpenAI's clients send them, and what is refused of them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_STOPS = 4
MOST_TOP_LOGPROBS = 20
MOST_PARTS = 2048
"""And messages: a million of them would hold up all others while they are looked at."""

UNSUPPORTED = {
    "audio": (), "function_call": ("auto", "none"), "functions": ([],), "logit_bias": ({},), "modalities": (["text"],),
    "moderation": (), "prediction": (), "reasoning_effort": ("none",), "tool_choice": ("auto", "none"), "tools": ([],),
    "verbosity": ("medium",), "web_search_options": (),
}  # fmt: skip
"""Of OpenAI's parameters those that are not supported, with values that ask for nothing: clients send them."""
IGNORED = (
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
)  # fmt: skip
"""Those that change no answer."""


class ApiError(Exception):
    """What is answered with an HTTP status instead; `param` names the part of the request that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_empty_values(cls, given: Any) -> Any:
        """What is null or an empty list is as good as left out: clients fill in what they know of."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None and value != []}


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"
    """Ignored: the target's processor says how large a picture becomes."""


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    """Ignored: chat templates know no names."""

    @property
    def characters(self) -> int:
        """Of its texts."""
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(part.text) for part in self.content if isinstance(part, TextPart))


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(_Strict):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema and the field json_schema belong together")
        return self


class ChatRequest(_Strict):
    """What POST /v1/chat/completions takes."""

    messages: list[Message]
    model: str
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    speculate: bool = True
    """Ours: False decodes without a draft."""

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def parse_request(body: Any) -> ChatRequest:
    """Check a request.

    Args:
        body: of JSON.

    Raises:
        ApiError: a parameter is wrong, unknown or not supported; it names it.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    for name, nothing in UNSUPPORTED.items():
        if (value := body.get(name)) is not None and value not in nothing:
            raise ApiError(400, f"{name} is not supported here", name, "unsupported_parameter")
    _refuse_crowds(body.get("messages"))
    known = {name: value for name, value in body.items() if name not in (*UNSUPPORTED, *IGNORED)}
    try:
        request = ChatRequest.model_validate(known)
    except ValueError as error:
        raise _api_error(error) from None
    _check_together(request)
    return request


def _refuse_crowds(messages: Any) -> None:
    of_messages = messages if isinstance(messages, list) else []
    lists = [of_messages, *(one.get("content") for one in of_messages if isinstance(one, dict))]
    if (found := sum(len(one) for one in lists if isinstance(one, list))) > MOST_PARTS:
        reason = f"{found:,} messages and parts are more than {MOST_PARTS:,}"
        raise ApiError(400, reason, "messages", "invalid_value")


def _check_together(request: ChatRequest) -> None:
    if request.max_tokens and request.max_completion_tokens:
        reason = "max_tokens and max_completion_tokens both say how long an answer may be, expected one of them"
        raise ApiError(400, reason, "max_tokens", "invalid_value")
    if len(request.stops) > MOST_STOPS or "" in request.stops:
        raise ApiError(400, f"stop takes up to {MOST_STOPS} texts, none of them empty", "stop", "invalid_value")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs belongs to logprobs: true", "top_logprobs", "invalid_value")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options belongs to stream: true", "stream_options", "invalid_value")


def _api_error(error) -> ApiError:
    """One of pydantic's errors, as one line: what looks most like something has come furthest."""
    furthest = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
    # of a union, the kinds that were tried stand among the names
    place = [str(part) for part in furthest["loc"] if part != "str" and "[" not in str(part)]
    for tag in ("text", "image_url"):
        if tag in place[:-1] and place[place.index(tag) - 1].isdigit():
            place.remove(tag)
    name, reason = ".".join(place), furthest["msg"].removeprefix("Value error, ")
    if furthest["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter: {name}", name, "unknown_parameter")
    if furthest["type"] == "missing":
        return ApiError(400, f"{name} is missing", name, "missing_required_parameter")
    return ApiError(400, f"{name or 'the body'}: {reason}", name or None, "invalid_value")
