"""`SpecModel`: a VLM with a draft, as users call it."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from vispec.methods import LOOKUP
from vispec.model.adaptive import parse_tree
from vispec.model.arguments import number, of_kind, whole
from vispec.model.batches import SinglePrompt, new_token_limits, single_prompts
from vispec.model.collecting import StreamedTokens, collected, streamed
from vispec.model.decoding import Decoder
from vispec.model.drafts import Draft, PromptLookup
from vispec.model.drafts.loading import find_any_draft, load_any_draft
from vispec.model.fitting import check_branches, fitted, refuse_draft_options
from vispec.model.generation import SpecOutput, answer, decoding_method, generate_by
from vispec.model.hub_files import SHARED_HUB_OPTIONS, hub_options
from vispec.model.inputs import prompt_inputs
from vispec.model.joining import OpenBatch
from vispec.model.loading import load_target, one_dtype
from vispec.model.policies import Always, Auto, Policy
from vispec.model.processors import text_options
from vispec.model.rows import Round, Stop
from vispec.model.sampling import Choice, Sampling
from vispec.model.shape import AUTO, TUNE, TreeShape
from vispec.model.target import Target
from vispec.model.tune import TOKENS, Tuning, tune

logger = logging.getLogger("vispec")


class SpecModel:
    """A target and its draft.

    Args:
        target: a vision-language model of transformers, or the `Target` of another SpecModel, to share it.
        draft: its draft head, in the target's dtype and on the device of the target's last layer, or a `PromptLookup`,
            or a `VLMDraft`; None for a model that only runs the baseline.
        total_token: nodes of the tree, root included. Where the target follows chains alone, `depth` says how long.
        depth: expansions after the first level, so at most depth + 1 tokens are accepted in a round; Medusa's is fixed.
        top_k: nodes expanded a level.
        tree: all three at once, as in "30/3/8"; or a rule of `vispec.model.adaptive` that grows it, as in "talon"; or
            "auto", which chooses before each round by what rounds cost and bring, plain steps among them; or "tune",
            which measures on the first prompt which tree is the fastest.
        fast: False decodes by transformers' own layers alone, see `Target`.
        skip_visual: a draft is skipped where r of `vispec.model.gaze` is at least this; None: never.

    Raises:
        TypeError: target or draft is none.
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
        skip_visual: float | None = None,
    ):
        if not (isinstance(target, Target) or (isinstance(target, torch.nn.Module) and hasattr(target, "config"))):
            found = type(target).__name__
            raise TypeError(f"target must be a loaded model, found {found}; SpecModel.from_pretrained loads one")
        self.target = target if isinstance(target, Target) else Target(target, fast)
        self._ignored = text_options(self.target.model.generation_config)
        self.draft: Draft | None = None
        self.shape = TreeShape(total_token, depth, top_k)
        self.tree: str | None = None
        """AUTO or TUNE, while that is to choose; None: `shape` does."""
        self.skip_visual = skip_visual if skip_visual is None else number("skip_visual", skip_visual)
        self._decoder = Decoder(self.target)
        self._auto: dict[int, Auto] = {}  # by the prompts of a batch, since their number changes what rounds cost
        self.set_tree(tree)
        if draft is not None:
            if not isinstance(draft, Draft):
                raise TypeError(f"draft must be a draft head or a PromptLookup, found {type(draft).__name__}")
            self._attach(draft)

    def set_tree(self, tree: str | TreeShape | None) -> None:
        """Draft trees of this shape from now on; see the class."""
        of_kind("tree", tree, str, TreeShape)
        if tree in (AUTO, TUNE):
            self.tree, self._auto = tree, {}
        elif tree is not None:
            shape = parse_tree(tree) if isinstance(tree, str) else tree
            check_branches(self.target, shape)
            self.tree, self.shape = None, shape if self.draft is None else fitted(shape, self.target, self.draft)

    @classmethod
    def from_pretrained(
        cls,
        base_model_path: str | PreTrainedModel,
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
        spec_revision: str | None = None,
        spec_subfolder: str | None = None,
        skip_visual: float | None = None,
        draft_image_rows: float | None = None,
        **kwargs,
    ) -> "SpecModel":
        """Load a target and its draft head from folders or hub ids.

        Args:
            base_model_path: the target, anything that transformers' AutoModelForImageTextToText loads; or one that is
                loaded.
            spec_model_path: the draft head, or a whole smaller VLM; None loads the target alone.
            method: one of vispec.methods.MODELS; read from the files, and checked against them when given. "lookup"
                drafts from the text so far and takes no spec_model_path.
            total_token, depth, top_k, tree, fast, skip_visual: see the class.
            num_q: queries of the vision adaptor; read from the weights, and checked against them when given.
            torch_dtype, device_map, kwargs: for the target; the draft head follows it. Of the kwargs token, cache_dir
                and local_files_only hold for the download of both; revision and subfolder are the target's alone.
            spec_revision, spec_subfolder: the head's: of its hub repository, or the subfolder of its folder.
            draft_vocab: False lets the head propose all tokens, though a draft vocabulary lies beside it.
            draft_image_rows: share of image rows that a VLM as the draft keeps, see `VLMDraft`.
            dtype: torch_dtype by its name in transformers 5.

        Raises:
            ValueError, OSError: something is missing or does not fit; the message names it.
        """
        # what is wrong is said before minutes of loading
        TreeShape(total_token, depth, top_k)
        if isinstance(tree, str) and tree not in (AUTO, TUNE):
            tree = parse_tree(tree)
        place = {"revision": spec_revision, "subfolder": spec_subfolder}
        refuse_draft_options(method, spec_model_path, place, draft_image_rows)
        hub = hub_options(kwargs, SHARED_HUB_OPTIONS) | place
        if spec_model_path is not None:
            find_any_draft(spec_model_path, method, **hub)
        target, dtype = base_model_path, one_dtype(torch_dtype, dtype)
        if not isinstance(target, PreTrainedModel):
            target = load_target(base_model_path, dtype, device_map, **kwargs)
        elif dtype != "auto" or device_map is not None:
            raise ValueError("dtype and device_map load a target, found one that is loaded")
        model = cls(target, None, total_token, depth, top_k, tree, fast, skip_visual)
        if method == LOOKUP:
            model._attach(PromptLookup())
        elif spec_model_path is not None:
            asked = method, num_q, draft_vocab, draft_image_rows
            model._attach(load_any_draft(spec_model_path, model.target, *asked, hub_options(kwargs), **hub))
        return model

    def _attach(self, draft: Draft) -> None:
        draft.check(self.target)
        if self.target.fast:
            draft.make_lean()
        self._decoder = Decoder(self.target, draft, self.skip_visual)
        self.draft, self._auto = draft, {}
        self.shape = fitted(self.shape, self.target, draft) if self.tree is None else self.fit(self.shape)

    @property
    def device(self) -> torch.device:
        """Where features and logits come out; inputs may be on any device."""
        return self.target.device

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        seed: int | Sequence[int] | None = None,
        speculate: bool = True,
        **options,
    ) -> torch.Tensor | SpecOutput:
        """Answer as the target's own generate() with the same arguments, faster.

        Greedy answers are the same, token for token in float32; sampled ones have the same distribution. The defaults
        are generate()'s too: what the target's generation config says, penalties and sampling among it, and 20 new
        tokens where no length is given.

        Args:
            input_ids: (B, L) prompts with their image tokens expanded, padded on the left, as the family's processor
                returns them.
            seed: of the random numbers when sampling: a list with one entry for each row, or the first row's, from
                which the others count up; None: drawn from torch's default generator. A seed gives one text, whatever
                the tree, with and without a draft, alone and in a batch.
            speculate: False decodes plainly.
            options: whatever else the processor returned, and what generate() takes: generation_config, do_sample,
                temperature, max_new_tokens, logits_processor, stopping_criteria, stop_strings with tokenizer, streamer,
                return_dict_in_generate, output_scores, num_return_sequences, … A logits processor is called with the
                text before each token of an answer, rows of a batch in groups of equal length.

        Returns:
            What generate() returns: (B, L + new) ids, padded behind shorter answers, or with
            `return_dict_in_generate` a `SpecOutput`.

        Raises:
            TypeError: an argument is neither an option nor a processor's output that the target takes.
            ValueError: an option asks for beams, contrastive search, assisted decoding, guidance or another way of
                decoding that trees cannot follow; or generate() itself refuses it.
        """
        decode = partial(answer, self.target, self._rounds, seed=seed, speculate=speculate)
        return generate_by(decode, self.target, input_ids, options, self.generate)

    @property
    def generate_with(self) -> Callable:
        """For `target.generate(**inputs, custom_generate=spec_model.generate_with)`, from transformers 4.56 on.

        There `generate` does all but the decoding; `seed` and `speculate` may be given to it too. It does not hand over
        `streamer` and `tokenizer` (seen in 5.23), which `SpecModel.generate` has.
        """
        return decoding_method(self.target, self._rounds)

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
        rounds = self._asked(input_ids, inputs, temperature, top_p, top_k, max_new_tokens, max_length)
        return collected(rounds, input_ids, self.target, log, return_acceptance_len, return_decode_time)

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
        rounds = self._asked(input_ids, inputs, temperature, top_p, top_k, max_new_tokens, max_length, speculate=False)
        return collected(rounds, input_ids, self.target, log, return_acceptance_len, return_decode_time)

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
        own_config: bool = False,
        **inputs,
    ) -> Iterator[StreamedTokens]:
        """Yield the new tokens of one prompt after each round; arguments as for `specgenerate`.

        `speculate=False` streams the baseline; with `own_config` all else that the target's generation config says
        applies too, as in `generate`. Bad input raises here, not at the first token. Closing the iterator early ends
        the generation.
        """
        inputs = prompt_inputs(self.stream, self.target.model, input_ids, inputs)
        if len(input_ids) > 1:
            raise ValueError(f"one prompt at a time can be streamed, found {len(input_ids)}")
        if own_config:
            if max_length is not None:
                room = whole("max_length", max_length, 1) - input_ids.shape[1]
                max_new_tokens = min(whole("max_new_tokens", max_new_tokens, 1), room)
            options = Sampling(temperature, top_p, top_k).options | {"max_new_tokens": max_new_tokens}
            decode = partial(answer, self.target, self._rounds, speculate=speculate, streams=True)
            return generate_by(decode, self.target, input_ids, inputs | options, self.stream)
        rounds = self._asked(input_ids, inputs, temperature, top_p, top_k, max_new_tokens, max_length, speculate)
        return streamed(rounds)

    def open_batch(self, rows: int, tokens: int, speculate: bool = True) -> OpenBatch:
        """Room for so many answers that begin and end at any time, of so many tokens with their prompts."""
        return OpenBatch(self._decoder, tokens, [self._policy(speculate, 1 + more) for more in range(rows)])

    def tune(self, prompts: Sequence[Mapping], max_new_tokens: int = TOKENS) -> Tuning:
        """Measure by some dozens of answers which tree is the fastest here, log why, and use it from now on.

        Args:
            prompts: what the processor returned for each of a few typical prompts, input_ids included.
            max_new_tokens: of each answer while measuring.

        Raises:
            ValueError: there is no draft head, or the answers are too short to measure anything.
        """
        self._require_draft()
        drafting = copy.copy(self)
        if self.skip_visual is not None:  # how good trees are shows in rounds with a draft
            drafting.skip_visual, drafting._decoder = None, Decoder(self.target, self.draft)
        tuning = tune(drafting, prompts, max_new_tokens)
        self.set_tree(tuning.shape)
        logger.info("%s", tuning.report())
        return tuning

    def with_tree(self, tree: str | TreeShape, draft: Draft | None = None) -> "SpecModel":
        """The same model with other trees, and another draft if one is given; all tensors are shared."""
        model = copy.copy(self)
        model.draft = self.draft if draft is None else None
        model.set_tree(tree)
        if draft is not None:
            model._attach(draft)
        return model

    def warmup(self, prompt_tokens: int, max_new_tokens: int, rows: int = 1) -> None:
        """Do now what else comes up in answers of this size, in both arms: choose kernels, capture steps on a GPU.

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

    def fit(self, shape: TreeShape) -> TreeShape:
        """The largest tree not above this one that the draft can fill and the target can follow."""
        return self.draft.fit(self.target.fit(shape))

    def _require_draft(self) -> None:
        if self.draft is None:
            raise ValueError("this model was loaded without a draft head (spec_model_path), it has only the baseline")

    def _asked(
        self, input_ids, inputs, temperature, top_p, top_k, max_new_tokens, max_length, speculate=True
    ) -> Iterator[dict[int, Round]]:
        """The rounds that answer a call of `specgenerate` or of its relatives."""
        if self._ignored:
            ignored = ", ".join(self._ignored)
            logger.warning("%s of the target's generation config is not applied; generate() does", ignored)
            self._ignored.clear()  # said once, also for those that share the target by `with_tree`
        sampling = Sampling(temperature, top_p, top_k)
        prompts = single_prompts(self.target.model, input_ids, inputs)
        lengths, padded = [ids.shape[1] for ids, _ in prompts], input_ids.shape[1]
        limits = new_token_limits(lengths, padded, self.target.max_positions, max_new_tokens, max_length)
        stops = [Stop(limit, frozenset(self.target.eos_token_ids)) for limit in limits]
        return self._rounds(prompts, stops, sampling.choice(len(prompts)), speculate)

    def _rounds(
        self, prompts: list[SinglePrompt], stops: list[Stop], choice: Choice, speculate: bool
    ) -> Iterator[dict[int, Round]]:
        if speculate and self.tree == TUNE:
            self.tune([{"input_ids": ids, **rest} for ids, rest in prompts[:1]])
        return self._decoder.rounds(prompts, stops, choice, self._policy(speculate, len(prompts)))

    def _policy(self, speculate: bool, rows: int) -> Policy:
        if not speculate:
            return Always(None)
        self._require_draft()
        if self.tree != AUTO:
            return Always(self.shape, skipping=self.skip_visual is not None)
        return (self._auto.get(rows) or self._auto.setdefault(rows, Auto(self.fit))).answer()
