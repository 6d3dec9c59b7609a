"""`SpecModel`: a VLM with a draft head, as users call it."""

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from vispec.model.acceptance import Sampling
from vispec.model.checkpoints import load_draft
from vispec.model.decoding import BaselineDecoder, Round, SpeculativeDecoder, Stop
from vispec.model.draft import BaseHead
from vispec.model.draft_vocab import DraftOutput
from vispec.model.lookup import PromptLookup
from vispec.model.target import VIDEO_INPUTS, Target, hub_options, load_target
from vispec.model.tree import TreeShape

if TYPE_CHECKING:
    from vispec.model.tune import Tuning

logger = logging.getLogger("vispec")


@dataclass
class StreamedTokens:
    """What one round of `SpecModel.stream` brings."""

    token_ids: list[int]
    drafted: list[bool]
    """Which of them the draft head had right; the others are the target's own."""
    accepted: int
    """Draft tokens that verification accepted, before the answer's end cut any of them off."""


class SpecModel:
    """A target and its draft head.

    Args:
        target: a vision-language model of transformers, or the `Target` of another SpecModel, to share it.
        draft: its draft head, on the device of the target's last layer, or a `PromptLookup`; None for a model that only
            runs the baseline.
        total_token: nodes of the tree, root included.
        depth: expansions after the first level, so at most depth + 1 draft tokens are accepted in a round. Medusa does
            not use it: its trees have as many levels as it has heads.
        top_k: nodes expanded a level.
    """

    def __init__(
        self,
        target: PreTrainedModel | Target,
        draft: BaseHead | PromptLookup | None = None,
        total_token: int = 30,
        depth: int = 3,
        top_k: int = 8,
    ):
        self.target = target if isinstance(target, Target) else Target(target)
        self.draft: BaseHead | PromptLookup | None = None
        self.draft_output = DraftOutput(self.target.logits)
        self.shape = TreeShape(total_token, depth, top_k)
        if draft is not None:
            self._attach(draft)

    @classmethod
    def from_pretrained(
        cls,
        base_model_path: str,
        spec_model_path: str | None = None,
        method: str | None = None,
        total_token: int = 30,
        depth: int = 3,
        top_k: int = 8,
        num_q: int | None = None,
        torch_dtype: str | torch.dtype = "auto",
        device_map: str | dict | None = None,
        draft_vocab: bool = True,
        **kwargs,
    ) -> "SpecModel":
        """Load a target and its draft head from folders or hub ids.

        Args:
            base_model_path: the target, anything that transformers' AutoModelForImageTextToText loads.
            spec_model_path: the draft head; None loads the target alone, for `baseline_generate`.
            method: "vispec", "eagle2" or "medusa"; read from the weights, and checked against them when given. "lookup"
                drafts from the text so far and takes no spec_model_path.
            total_token, depth, top_k: size of the tree, see the class.
            num_q: queries of the vision adaptor; read from the weights, and checked against them when given.
            torch_dtype, device_map, kwargs: for the target; the draft head follows it.
            draft_vocab: False lets the head propose all tokens, though a draft vocabulary lies beside it.

        Raises:
            ValueError, OSError: something is missing or does not fit; the message names it.
        """
        TreeShape(total_token, depth, top_k)  # what is wrong is said before minutes of loading
        if method == "lookup" and spec_model_path is not None:
            raise ValueError(f"spec_model_path {spec_model_path}: method 'lookup' has no draft head, expected None")
        target = load_target(base_model_path, torch_dtype, device_map, **kwargs)
        model = cls(target, None, total_token, depth, top_k)
        if method == "lookup":
            model._attach(PromptLookup())
        elif spec_model_path is not None:
            embedding = model.target.embed_tokens.weight
            draft = load_draft(spec_model_path, method, num_q, model.target.dtype, embedding, draft_vocab)
            if draft.draft_vocab is not None:
                draft.draft_vocab.check_tokenizer(base_model_path, **hub_options(kwargs))
            model._attach(draft)
            model.draft.to(model.target.device)
        return model

    def _attach(self, draft: BaseHead | PromptLookup) -> None:
        if isinstance(draft, BaseHead):
            _check_pair(self.target, draft)
            if draft.draft_vocab is not None:
                self.draft_output = draft.draft_vocab.output(self.target.lm_head, self.target.device)
        self.shape = _fitted(self.shape, draft)
        self.draft = draft

    @property
    def device(self) -> torch.device:
        """Where features and logits come out; inputs may be on any device."""
        return self.target.device

    def specgenerate(
        self,
        input_ids: torch.Tensor,
        *,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int | None = None,
        log: bool = False,
        return_acceptance_len: bool = False,
        return_decode_time: bool = False,
        **inputs,
    ):
        """Answer by tree speculative decoding: the target's own greedy tokens, or samples of its own distribution.

        Args:
            input_ids: (1, L) prompt with its image tokens expanded, as the family's processor returns it.
            temperature: 0 is greedy.
            top_p, top_k: warpers when sampling; 0 is off.
            max_new_tokens: most tokens to add.
            max_length: most tokens of prompt and answer together, padding included.
            log, return_acceptance_len, return_decode_time: what to return besides the ids.
            inputs: whatever else the processor returned (attention_mask, pixel_values, image sizes, grids, …).

        Returns:
            output_ids (1, L + new). When anything else is asked for, a tuple: output_ids; with `log` the number of
            new tokens and the 0-based index of the last round (-1 if the prompt's pass was enough); with
            `return_acceptance_len` the accepted draft tokens of each round; with `return_decode_time` the seconds
            after prefill and first tree.

        Raises:
            ValueError: the prompt is a batch, holds video, or does not fit the target's positions.
        """
        rounds = self._rounds(input_ids, inputs, temperature, top_p, top_k, max_new_tokens, max_length)
        return self._collect(rounds, input_ids, log, return_acceptance_len, return_decode_time)

    def baseline_generate(
        self,
        input_ids: torch.Tensor,
        *,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int | None = None,
        log: bool = False,
        return_acceptance_len: bool = False,
        return_decode_time: bool = False,
        **inputs,
    ):
        """Answer by plain autoregressive decoding; arguments and returns are those of `specgenerate`."""
        rounds = self._rounds(input_ids, inputs, temperature, top_p, top_k, max_new_tokens, max_length, speculate=False)
        return self._collect(rounds, input_ids, log, return_acceptance_len, return_decode_time)

    def stream(
        self,
        input_ids: torch.Tensor,
        *,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int | None = None,
        speculate: bool = True,
        **inputs,
    ) -> Iterator[StreamedTokens]:
        """Yield the new tokens after each round; arguments as for `specgenerate`, `speculate=False` for the baseline.

        Bad input raises here, not at the first token. Closing the iterator early ends the generation.
        """
        rounds = self._rounds(
            input_ids, inputs, temperature, top_p, top_k, max_new_tokens, max_length, speculate=speculate
        )
        return (StreamedTokens(r.tokens, [i < r.accepted for i in range(len(r.tokens))], r.accepted) for r in rounds)

    def tune(self, prompts: Sequence[Mapping], max_new_tokens: int = 48) -> "Tuning":
        """Measure which draft tree brings the most tokens a second here, print why, and use it from now on.

        Takes as long as some dozens of answers; see `vispec.model.tune`.

        Args:
            prompts: what the processor returned for each of a few typical prompts, input_ids included.
            max_new_tokens: of each answer while measuring.

        Raises:
            ValueError: there is no draft head, or the answers are too short to measure anything.
        """
        from vispec.model.tune import tune

        self._require_draft()
        tuning = tune(self, prompts, max_new_tokens)
        self.shape = tuning.shape
        print(tuning.report())
        return tuning

    def with_tree(self, shape: TreeShape, draft: BaseHead | PromptLookup | None = None) -> "SpecModel":
        """The same model with a tree of another shape, and another draft if one is given; all tensors are shared."""
        model = copy.copy(self)
        model.shape = shape
        model.draft = draft or self.draft
        return model

    def _require_draft(self) -> None:
        if self.draft is None:
            raise ValueError("this model was loaded without a draft head (spec_model_path), it has only the baseline")

    def _rounds(
        self, input_ids, inputs, temperature, top_p, top_k, max_new_tokens, max_length, speculate=True
    ) -> Iterator[Round]:
        sampling = Sampling(temperature, top_p, int(top_k))
        padded = input_ids.shape[-1]
        input_ids, inputs = _without_padding(input_ids, inputs)
        padding = padded - input_ids.shape[1]
        limit = self._new_token_limit(input_ids.shape[1], padding, max_new_tokens, max_length)
        stop = Stop(limit, frozenset(self.target.eos_token_ids))
        if not speculate:
            return BaselineDecoder(self.target, sampling).rounds(input_ids, inputs, stop)
        self._require_draft()
        decoder = SpeculativeDecoder(self.target, self.draft, self.shape, sampling, self.draft_output)
        return decoder.rounds(input_ids, inputs, stop)

    def _new_token_limit(self, length: int, padding: int, max_new_tokens: int, max_length: int | None) -> int:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
        if length > self.target.max_positions:
            raise ValueError(f"the prompt has {length} tokens, the target has {self.target.max_positions} positions")
        # the last new token is never fed back, so it needs no position
        limit = min(max_new_tokens, self.target.max_positions - length + 1)
        if limit < max_new_tokens and max_length is None:
            logger.warning(
                "the prompt has %d tokens, the target %d positions: the answer ends after %d tokens at the latest",
                *(length, self.target.max_positions, limit),
            )
        if max_length is not None:
            room = max_length - length - padding
            if room < 1:
                raise ValueError(
                    f"the prompt has {length + padding} tokens, max_length {max_length} leaves no room for more"
                )
            limit = min(limit, room)
        return limit

    def _collect(self, rounds: Iterator[Round], input_ids, log, return_acceptance_len, return_decode_time):
        tokens = next(rounds).tokens
        start = self._now()
        acceptance_lengths = []
        for step in rounds:
            tokens += step.tokens
            acceptance_lengths.append(step.accepted)
        seconds = self._now() - start
        new_ids = torch.tensor([tokens], dtype=input_ids.dtype, device=input_ids.device)
        result = [torch.cat([input_ids, new_ids], dim=1)]
        if log:
            result += [len(tokens), len(acceptance_lengths) - 1]
        if return_acceptance_len:
            result.append(acceptance_lengths)
        if return_decode_time:
            result.append(seconds)
        return result[0] if len(result) == 1 else tuple(result)

    def _now(self) -> float:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        return time.perf_counter()


def _without_padding(input_ids: torch.Tensor, inputs: Mapping) -> tuple[torch.Tensor, dict]:
    """A single prompt without the padding on its left; refuses what decoding does not take."""
    for name in VIDEO_INPUTS:
        if inputs.get(name) is not None:
            raise ValueError(f"video is not supported yet, found {name}")
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must have the shape (1, L) with L > 0, found {tuple(input_ids.shape)}")
    if input_ids.shape[0] != 1:
        raise ValueError(f"batches are not supported yet: one prompt at a time, found {input_ids.shape[0]}")
    attention = inputs.get("attention_mask")
    if attention is None:
        return input_ids, dict(inputs)
    if attention.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape {tuple(input_ids.shape)} of input_ids, found {tuple(attention.shape)}"
        )
    padding = int((attention == 0).sum())
    if padding == 0:
        return input_ids, dict(inputs)
    if padding == input_ids.shape[1] or bool(attention[0, :padding].any()):
        raise ValueError("attention_mask may only hide padding on the left of the prompt")
    trimmed = {
        name: value[:, padding:] if name in ("attention_mask", "mm_token_type_ids", "token_type_ids") else value
        for name, value in inputs.items()
    }
    return input_ids[:, padding:], trimmed


def _fitted(shape: TreeShape, draft: BaseHead | PromptLookup) -> TreeShape:
    """The tree that a draft can fill; says so where it is smaller than what was asked for."""
    fitted = draft.fit(shape)
    if (fitted.total_token, fitted.top_k) != (shape.total_token, shape.top_k):
        logger.warning(
            "a tree with total_token %d, depth %d and top_k %d cannot be filled, it is cut to total_token %d, top_k %d",
            *(shape.total_token, fitted.depth, shape.top_k, fitted.total_token, fitted.top_k),
        )
    return fitted


def _check_pair(target: Target, draft: BaseHead) -> None:
    """A draft head reads the target's features and embeddings, so sizes have to agree."""
    vocabulary, hidden = target.embed_tokens.weight.shape
    found = draft.config.hidden_size, draft.config.vocab_size
    if found != (hidden, vocabulary):
        raise ValueError(
            f"the draft head was made for another target: hidden_size {found[0]} and vocab_size {found[1]}, "
            f"the target has {hidden} and {vocabulary}"
        )
