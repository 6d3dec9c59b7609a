"""`SpecModel`: a VLM with a draft, as users call it."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from vispec.model.batches import new_token_limits, single_prompts
from vispec.model.decoding import Decoder
from vispec.model.drafts import METHODS, BaseHead, Draft, PromptLookup, load_draft
from vispec.model.drafts.checkpoints import find_draft
from vispec.model.inputs import prompt_inputs
from vispec.model.loading import SHARED_HUB_OPTIONS, hub_options, load_target, one_dtype
from vispec.model.policies import Always, Auto, Policy
from vispec.model.rows import Round, Stop
from vispec.model.sampling import Sampling
from vispec.model.target import Target
from vispec.model.tree import TreeShape
from vispec.model.tune import TOKENS, Tuning, tune
from vispec.timing import now

logger = logging.getLogger("vispec")

AUTO, TUNE = "auto", "tune"
"""What a tree may be called besides total_token/depth/top_k."""


@dataclass
class StreamedTokens:
    """What one round of `SpecModel.stream` brings."""

    token_ids: list[int]
    drafted: list[bool]
    """Which of them the draft head had right; the others are the target's own."""
    accepted: int | None
    """Draft tokens that verification accepted, before the answer's end cut any of them off; None without a draft."""


class SpecModel:
    """A target and its draft.

    Args:
        target: a vision-language model of transformers, or the `Target` of another SpecModel, to share it.
        draft: its draft head, in the target's dtype and on the device of the target's last layer, or a `PromptLookup`;
            None for a model that only runs the baseline.
        total_token: nodes of the tree, root included.
        depth: expansions after the first level, so at most depth + 1 draft tokens are accepted in a round. Medusa does
            not use it: its trees have as many levels as it has heads.
        top_k: nodes expanded a level.
        tree: all three at once, as in "30/3/8"; or "auto", which chooses before each round by what rounds cost and
            bring, plain steps among them; or "tune", which measures on the first prompt which tree is the fastest.
        fast: False decodes by transformers' own layers alone, see `Target`.

    Raises:
        ValueError: the target is of a kind that tree decoding cannot handle, or the draft head does not fit it.
    """

    def __init__(
        self,
        target: PreTrainedModel | Target,
        draft: Draft | None = None,
        total_token: int = 30,
        depth: int = 3,
        top_k: int = 8,
        tree: str | TreeShape | None = None,
        fast: bool = True,
    ):
        self.target = target if isinstance(target, Target) else Target(target, fast)
        self.draft: Draft | None = None
        self.shape = TreeShape(total_token, depth, top_k)
        self.tree: str | None = None
        """AUTO or TUNE, while that is to choose; None: `shape` does."""
        self._decoder = Decoder(self.target)
        self._auto: dict[int, Auto] = {}  # by the prompts of a batch, since their number changes what rounds cost
        self.set_tree(tree)
        if draft is not None:
            self._attach(draft)

    def set_tree(self, tree: str | TreeShape | None) -> None:
        """Draft trees of this shape from now on; see the class."""
        if tree in (AUTO, TUNE):
            self.tree, self._auto = tree, {}
        elif tree is not None:
            shape = TreeShape.parse(tree) if isinstance(tree, str) else tree
            self.tree, self.shape = None, shape if self.draft is None else _fitted(shape, self.draft)

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
        tree: str | TreeShape | None = None,
        fast: bool = True,
        **kwargs,
    ) -> "SpecModel":
        """Load a target and its draft head from folders or hub ids.

        Args:
            base_model_path: the target, anything that transformers' AutoModelForImageTextToText loads.
            spec_model_path: the draft head; None loads the target alone, for `baseline_generate`.
            method: "vispec", "eagle2" or "medusa"; read from the weights, and checked against them when given. "lookup"
                drafts from the text so far and takes no spec_model_path.
            total_token, depth, top_k, tree, fast: see the class.
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
        if isinstance(tree, str) and tree not in (AUTO, TUNE):
            tree = TreeShape.parse(tree)
        if method not in (None, "lookup", *METHODS):
            raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}, lookup")
        if method == "lookup" and spec_model_path is not None:
            raise ValueError(f"spec_model_path {spec_model_path}: method 'lookup' has no draft head, expected None")
        hub = hub_options(kwargs, SHARED_HUB_OPTIONS)
        if spec_model_path is not None:
            find_draft(spec_model_path, **hub)
        target = load_target(base_model_path, one_dtype(torch_dtype, dtype), device_map, **kwargs)
        model = cls(target, None, total_token, depth, top_k, tree, fast)
        if method == "lookup":
            model._attach(PromptLookup())
        elif spec_model_path is not None:
            embedding = model.target.embed_tokens.weight
            draft = load_draft(spec_model_path, method, num_q, model.target.dtype, embedding, draft_vocab, **hub)
            if draft.draft_vocab is not None:
                draft.draft_vocab.check_tokenizer(base_model_path, **hub_options(kwargs))
            model._attach(draft.to(model.target.device))
        return model

    def _attach(self, draft: Draft) -> None:
        if isinstance(draft, BaseHead):
            _check_pair(self.target, draft)
        if self.target.fast:
            draft.make_lean()
        self._decoder = Decoder(self.target, draft)
        self.shape = _fitted(self.shape, draft)
        self.draft, self._auto = draft, {}

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
            tokens of each round with a draft; with `return_decode_time` the seconds after the target's prefill. For
            B > 1 all of these but the seconds are lists with one entry for each row.

        Raises:
            TypeError: an argument is neither one of these nor a processor's output that the target takes.
            ValueError: a prompt does not fit its images, its videos or the target's positions.
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

    def tune(self, prompts: Sequence[Mapping], max_new_tokens: int = TOKENS) -> Tuning:
        """Measure which draft tree brings the most tokens a second here, print why, and use it from now on.

        Takes as long as some dozens of answers; see `vispec.model.tune`.

        Args:
            prompts: what the processor returned for each of a few typical prompts, input_ids included.
            max_new_tokens: of each answer while measuring.

        Raises:
            ValueError: there is no draft head, or the answers are too short to measure anything.
        """
        self._require_draft()
        tuning = tune(self, prompts, max_new_tokens)
        self.set_tree(tuning.shape)
        print(tuning.report())
        return tuning

    def with_tree(self, tree: str | TreeShape, draft: Draft | None = None) -> "SpecModel":
        """The same model with other trees, and another draft if one is given; all tensors are shared."""
        model = copy.copy(self)
        if draft is not None:
            model.draft = None
        model.set_tree(tree)
        if draft is not None:
            model._attach(draft)
        return model

    def warmup(self, prompt_tokens: int, max_new_tokens: int, rows: int = 1) -> None:
        """Get ready for answers of this size, in both arms: choose kernels and, on a GPU, capture all steps.

        Without it, or beyond it, that happens when it comes up.

        Args:
            prompt_tokens: of the shortest prompt; up to it plus `max_new_tokens` steps of all lengths are captured.
            rows: prompts of a batch; what those that are left need when others have ended comes up later.
        """
        self._decoder.warm_up(self._policy(self.draft is not None, rows), prompt_tokens, max_new_tokens, rows)

    def free(self) -> None:
        """Give back the memory that waits for the next answer: a cache of one generation, and its CUDA graphs."""
        self._decoder.free()

    @property
    def captured(self) -> str:
        """Whether steps of decoding run in CUDA graphs: "all", "some" (captures have failed), or "none"."""
        if not self.target.can_capture:
            return "none"
        return "some" if self._decoder.failed_captures else "all"

    def _require_draft(self) -> None:
        if self.draft is None:
            raise ValueError("this model was loaded without a draft head (spec_model_path), it has only the baseline")

    def _rounds(
        self, input_ids, inputs, temperature, top_p, top_k, max_new_tokens, max_length, speculate=True
    ) -> Iterator[dict[int, Round]]:
        sampling = Sampling(temperature, top_p, int(top_k))
        prompts = single_prompts(self.target.model, input_ids, inputs)
        lengths, padded = [ids.shape[1] for ids, _ in prompts], input_ids.shape[1]
        limits = new_token_limits(lengths, padded, self.target.max_positions, max_new_tokens, max_length)
        stops = [Stop(limit, frozenset(self.target.eos_token_ids)) for limit in limits]
        if speculate:
            self._require_draft()
            if self.tree == TUNE:
                self.tune([{"input_ids": ids, **rest} for ids, rest in prompts[:1]])
        return self._decoder.rounds(prompts, stops, sampling, self._policy(speculate, len(prompts)))

    def _policy(self, speculate: bool, rows: int) -> Policy:
        if not speculate:
            return Always(None)
        if self.tree != AUTO:
            return Always(self.shape)
        auto = self._auto.get(rows) or self._auto.setdefault(rows, Auto(self.draft.fit))
        return auto.answer()

    def _collect(self, rounds: Iterator[dict[int, Round]], input_ids, log, return_acceptance_len, return_decode_time):
        answers = [step.tokens for step in next(rounds).values()]
        start = now(self.target.device)
        acceptance_lengths: list[list[int]] = [[] for _ in answers]
        last_rounds = [-1 for _ in answers]
        for steps in rounds:
            for row, step in steps.items():
                answers[row] += step.tokens
                last_rounds[row] += 1
                if step.drafted:
                    acceptance_lengths[row].append(step.accepted)
        seconds = now(self.target.device) - start
        result = [torch.cat([input_ids, self._padded(answers).to(input_ids)], dim=1)]
        per_row = []
        if log:
            per_row += [[len(tokens) for tokens in answers], last_rounds]
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


def _streamed(rounds: Iterator[dict[int, Round]]) -> Iterator[StreamedTokens]:
    """The rounds of a single prompt; closing this closes them at once, whoever else may know them."""
    with closing(rounds):
        for step in rounds:
            tokens, accepted = step[0].tokens, step[0].accepted
            drafted = [i < accepted for i in range(len(tokens))]
            yield StreamedTokens(tokens, drafted, accepted if step[0].drafted else None)


def _fitted(shape: TreeShape, draft: Draft) -> TreeShape:
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
