"""Logits processors for what OpenAI's requests ask, where transformers has none of the kind."""

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor, PrefixConstrainedLogitsProcessor, RepetitionPenaltyLogitsProcessor

from vispec.cli import one_line
from vispec.serve.protocol import ApiError, ChatRequest, ResponseFormat
from vispec.serve.text import TokenTexts
from vispec.text import INCOMPLETE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class OpenAIPenalties(LogitsProcessor):
    """Lowers the scores of tokens that the answer has: by `presence`, and by `frequency` for each time.

    Args:
        prompt: tokens of the prompt, which do not count.
    """

    def __init__(self, presence: float, frequency: float, prompt: int):
        self._presence, self._frequency, self._prompt = presence, frequency, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answer = input_ids[:, self._prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._presence * (counts > 0) - self._frequency * counts


class Grammars:
    """Processors that keep an answer within JSON, by lm-format-enforcer.

    Args:
        tokenizer: of the target; its vocabulary is read when it is needed first.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer, self._data, self._lock = tokenizer, None, threading.Lock()

    def processor(self, wanted: ResponseFormat) -> LogitsProcessor:
        """Of one answer.

        Raises:
            ApiError: the package is not there, or does not take the schema.
        """
        try:
            from lmformatenforcer import JsonSchemaParser, TokenEnforcer, TokenEnforcerTokenizerData
        except ImportError:
            reason = "response_format needs lm-format-enforcer on the server (pip install 'vispec[grammar]')"
            raise ApiError(400, reason, "response_format", "unsupported_parameter") from None
        with self._lock:
            if self._data is None:
                self._data = TokenEnforcerTokenizerData(*self._vocabulary(), False, len(self._tokenizer))
                logging.getLogger().addFilter(_tells_no_prompt)
        schema = wanted.json_schema.schema_ if wanted.json_schema else {"type": "object"}
        try:
            enforcer = TokenEnforcer(self._data, JsonSchemaParser(schema))
        except Exception as error:  # whatever its code trips over
            reason = f"response_format: the schema is not taken ({one_line(error)[:200]})"
            raise ApiError(400, reason, "response_format", "invalid_value") from None

        def allowed(row: int, text: torch.Tensor) -> list[int]:
            # these texts have a prompt, which is where it begins
            tokens, so_far = enforcer.get_allowed_tokens(text.tolist()).allowed_tokens, tuple(text.tolist())
            # where it fails it allows nothing, or the end of an answer that is not at its end
            ends = tokens[-1:] == [self._tokenizer.eos_token_id]
            if not tokens or (ends and not enforcer.prefix_states[so_far].parser.can_end()):
                reason = "response_format: the schema asks for what this server cannot hold an answer to"
                raise ApiError(400, reason, "response_format", "invalid_value")
            return tokens

        return PrefixConstrainedLogitsProcessor(allowed, num_beams=1)

    def _vocabulary(self) -> tuple[list[tuple[int, str, bool]], Callable[[list[int]], str], int]:
        """Tokens with their texts behind another one, and whether they begin a word; how to decode; the end token.

        The package's own function for this does not know transformers 5.
        """
        tokenizer, texts, found = self._tokenizer, TokenTexts(self._tokenizer), []
        for token in sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)):
            text = texts[token]
            found.append((token, text, len(text) > len(tokenizer.decode([token]))))
        return found, lambda tokens: tokenizer.decode(tokens).rstrip(INCOMPLETE), tokenizer.eos_token_id


def _tells_no_prompt(record: logging.LogRecord) -> bool:
    """The package would log the whole conversation where it cannot go on."""
    return "LMFormatEnforcer" not in str(record.msg)


def processors_of(request: ChatRequest, prompt: int, grammars: Grammars) -> list[LogitsProcessor]:
    """New ones for one answer, in the order of transformers' generate(); `prompt` is its tokens."""
    found: list[LogitsProcessor] = []
    if request.repetition_penalty not in (None, 1):
        found.append(RepetitionPenaltyLogitsProcessor(request.repetition_penalty))
    if request.presence_penalty or request.frequency_penalty:
        found.append(OpenAIPenalties(request.presence_penalty or 0, request.frequency_penalty or 0, prompt))
    if request.response_format is not None and request.response_format.type != "text":
        found.append(grammars.processor(request.response_format))
    return found
