"""`SpecModel`: a VLM with a draft head, as users call it."""

import copy
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from vispec.model.acceptance import Sampling
from vispec.model.batches import row_name, single_prompts
from vispec.model.checkpoints import METHODS, find_draft, load_draft
from vispec.model.decoding import BaselineDecoder, Decoder, Round, SpeculativeDecoder, Stop
from vispec.model.draft import BaseHead
from vispec.model.draft_vocab import DraftOutput
from vispec.model.hub import SHARED_HUB_OPTIONS, hub_options
from vispec.model.inputs import prompt_inputs
from vispec.model.lookup import PromptLookup
from vispec.model.packing import allow_packing
from vispec.model.target import Target, load_target
from vispec.model.tree import TreeShape

if TYPE_CHECKING:
    from vispec.model.tune import Tuning

logger = logging.getLogger("vispec")

KEPT_DECODERS = 4
"""Of one model: both arms, greedy and at one temperature."""


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
        draft: its draft head, in the target's dtype and on the device of the target's last layer, or a `PromptLookup`;
            None for a model that only runs the baseline.
        total_token: nodes of the tree, root included.
        depth: expansions after the first level, so at most depth + 1 draft tokens are accepted in a round. Medusa does
            not use it: its trees have as many levels as it has heads.
        top_k: nodes expanded a level.

    Raises:
        ValueError: the target is of a kind that tree decoding cannot handle, or the draft head does not fit it.
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
        self._decoders: dict[tuple, Decoder] = {}  # by what they were made for, the last one used at the end
        self._decoders_lock = threading.Lock()
        if draft is not None:
            self._attach(draft)

    def __copy__(self) -> "SpecModel":
        """The same target and draft; what is changed in the copy, the tree for example, is changed in it alone."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _decoders={}, _decoders_lock=threading.Lock())
        return other

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
        dtype: str | torch.dtype | None = None,
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
            torch_dtype, device_map, kwargs: for the target; the draft head follows it. Of the kwargs token, cache_dir
                and local_files_only hold for the download of both; revision and subfolder are the target's alone.
            draft_vocab: False lets the head propose all tokens, though a draft vocabulary lies beside it.
            dtype: torch_dtype by its name in transformers 5.

        Raises:
            ValueError, OSError: something is missing or does not fit; the message names it.
        """
        # what is wrong is said before minutes of loading
        TreeShape(total_token, depth, top_k)
        if method not in (None, "lookup", *METHODS):
            raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}, lookup")
        if method == "lookup" and spec_model_path is not None:
            raise ValueError(f"spec_model_path {spec_model_path}: method 'lookup' has no draft head, expected None")
        hub = hub_options(kwargs, SHARED_HUB_OPTIONS)
        if spec_model_path is not None:
            find_draft(spec_model_path, **hub)
        target = load_target(base_model_path, _one_dtype(torch_dtype, dtype), device_map, **kwargs)
        model = cls(target, None, total_token, depth, top_k)
        if method == "lookup":
            model._attach(PromptLookup())
        elif spec_model_path is not None:
            embedding = model.target.embed_tokens.weight
            draft = load_draft(spec_model_path, method, num_q, model.target.dtype, embedding, draft_vocab, **hub)
            if draft.draft_vocab is not None:
                draft.draft_vocab.check_tokenizer(base_model_path, **hub_options(kwargs))
            model._attach(draft.to(model.target.device))
        return model

    def _attach(self, draft: BaseHead | PromptLookup) -> None:
        if isinstance(draft, BaseHead):
            _check_pair(self.target, draft)
            allow_packing(draft)
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
            input_ids: (B, L) prompts with their image tokens expanded, padded on the left, as the family's processor
                returns them.
            temperature: 0 is greedy.
            top_p, top_k: warpers when sampling; 0 is off.
            max_new_tokens: most tokens to add.
            max_length: most tokens of a prompt and its answer together, padding included.
            log, return_acceptance_len, return_decode_time: what to return besides the ids.
            inputs: whatever else the processor returned (attention_mask, pixel_values, image sizes, grids, …).

        Returns:
            output_ids (B, L + new), filled up with padding behind answers that are shorter than the longest. When
            anything else is asked for, a tuple: output_ids; with `log` the number of new tokens and the 0-based index
            of the last round (-1 if the prompt's pass was enough); with `return_acceptance_len` the accepted draft
            tokens of each round; with `return_decode_time` the seconds after prefill and first tree. For B > 1 all of
            these but the seconds are lists with one entry for each row.

        Raises:
            TypeError: an argument is neither one of these nor a processor's output that the target takes.
            ValueError: a prompt holds video, or does not fit its images or the target's positions.
        """
        inputs = prompt_inputs(self.specgenerate, self.target.model, input_ids, inputs)
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
        inputs = prompt_inputs(self.baseline_generate, self.target.model, input_ids, inputs)
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
        """Yield the new tokens of one prompt after each round; arguments as for `specgenerate`.

        `speculate=False` streams the baseline. Bad input raises here, not at the first token. Closing the iterator
        early ends the generation.
        """
        inputs = prompt_inputs(self.stream, self.target.model, input_ids, inputs)
        if input_ids.dim() == 2 and len(input_ids) > 1:
            raise ValueError(f"one prompt at a time can be streamed, found {len(input_ids)}")
        rounds = self._rounds(
            input_ids, inputs, temperature, top_p, top_k, max_new_tokens, max_length, speculate=speculate
        )
        return _streamed(rounds)

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
    ) -> Iterator[dict[int, Round]]:
        sampling = Sampling(temperature, top_p, int(top_k))
        prompts = single_prompts(self.target.model, input_ids, inputs)
        ends, stops = frozenset(self.target.eos_token_ids), []
        for row, (ids, _) in enumerate(prompts):
            name = row_name(row, len(prompts))
            limit = self._new_token_limit(ids.shape[1], input_ids.shape[1], max_new_tokens, max_length, name)
            stops.append(Stop(limit, ends))
        if speculate:
            self._require_draft()
        return self._decoder(speculate, sampling).batch_rounds(prompts, stops)

    def _decoder(self, speculate: bool, sampling: Sampling) -> Decoder:
        """The decoder of an arm; a few stay for the next answers, since they have CUDA graphs and their memory."""
        # a decoder holds what its key names by id, so no id can be that of another object
        key = speculate, sampling, id(self.target)
        if speculate:
            key += self.shape, id(self.draft), id(self.draft_output)
        with self._decoders_lock:
            decoder = self._decoders.pop(key, None)
            if decoder is None and speculate:
                decoder = SpeculativeDecoder(self.target, self.draft, self.shape, sampling, self.draft_output)
            elif decoder is None:
                decoder = BaselineDecoder(self.target, sampling)
            self._decoders[key] = decoder
            while len(self._decoders) > KEPT_DECODERS:
                del self._decoders[next(iter(self._decoders))]
        return decoder

    def _new_token_limit(self, length: int, padded: int, max_new_tokens: int, max_length: int | None, row: str) -> int:
        """Most new tokens of a prompt of `length` tokens in a batch of `padded`; `row` begins a message about it."""
        positions = self.target.max_positions
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
        if length > positions:
            raise ValueError(f"{row}the prompt has {length} tokens, the target has {positions} positions")
        # the last new token is never fed back, so it needs no position
        limit = min(max_new_tokens, positions - length + 1)
        if limit < max_new_tokens and max_length is None:
            logger.warning(
                "%sthe prompt has %d tokens, the target %d positions: the answer ends after %d tokens at the latest",
                *(row, length, positions, limit),
            )
        if max_length is not None:
            if max_length <= padded:
                raise ValueError(f"the prompt has {padded} tokens, max_length {max_length} leaves no room for more")
            limit = min(limit, max_length - padded)
        return limit

    def _collect(self, rounds: Iterator[dict[int, Round]], input_ids, log, return_acceptance_len, return_decode_time):
        answers = [step.tokens for step in next(rounds).values()]
        start = self._now()
        acceptance_lengths: list[list[int]] = [[] for _ in answers]
        for steps in rounds:
            for row, step in steps.items():
                answers[row] += step.tokens
                acceptance_lengths[row].append(step.accepted)
        seconds = self._now() - start
        result = [torch.cat([input_ids, self._padded(answers).to(input_ids)], dim=1)]
        per_row = []
        if log:
            per_row += [[len(tokens) for tokens in answers], [len(lengths) - 1 for lengths in acceptance_lengths]]
        if return_acceptance_len:
            per_row.append(acceptance_lengths)
        result += per_row if len(answers) > 1 else [values[0] for values in per_row]
        if return_decode_time:
            result.append(seconds)
        return result[0] if len(result) == 1 else tuple(result)

    def _padded(self, answers: list[list[int]]) -> torch.Tensor:
        """(B, longest) answers, padded on the right by the target's padding token; by an end token if it has none."""
        padding = self.target.model.generation_config.pad_token_id
        if padding is None:
            padding = (self.target.eos_token_ids or [0])[0]
        longest = max(map(len, answers))
        return torch.tensor([tokens + [padding] * (longest - len(tokens)) for tokens in answers])

    def _now(self) -> float:
        if self.target.device.type == "cuda":
            # not the whole device: another thread may be capturing a step there, which that would break
            torch.cuda.current_stream(self.target.device).synchronize()
        return time.perf_counter()


def _streamed(rounds: Iterator[dict[int, Round]]) -> Iterator[StreamedTokens]:
    """The rounds of a single prompt; closing this closes them at once, whoever else may know them."""
    with closing(rounds):
        for step in rounds:
            tokens, accepted = step[0].tokens, step[0].accepted
            yield StreamedTokens(tokens, [i < accepted for i in range(len(tokens))], accepted)


def _one_dtype(torch_dtype: str | torch.dtype, dtype: str | torch.dtype | None) -> str | torch.dtype:
    """The dtype that was asked for, by either of its names."""
    named = [getattr(torch, str(value), value) for value in (torch_dtype, dtype)]
    if dtype is None or torch_dtype == "auto" or named[0] == named[1]:
        return torch_dtype if dtype is None else dtype
    raise ValueError(f"torch_dtype and dtype are two names of one thing, found {torch_dtype} and {dtype}")


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
    wanted = torch.empty(0, dtype=target.dtype, device=target.device)  # "cuda" becomes "cuda:0"
    places = {(parameter.dtype, parameter.device) for parameter in draft.parameters()}
    if places != {(wanted.dtype, wanted.device)}:
        found = " and ".join(sorted(f"{dtype} on {device}" for dtype, device in places))
        raise ValueError(
            f"the draft head is in {found}, the target in {wanted.dtype} on {wanted.device}: bring the head there by "
            "draft.to(device, dtype)"
        )
