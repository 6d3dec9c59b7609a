"""Transformers' generate(), decoded by us.

The target's own generate() prepares a request as always: defaults of the model, lengths, logits processors, stopping
criteria, warnings and errors, in whatever version of transformers is installed. It then calls `_sample`, and that is
what stands here in its place. The target itself is left as it is: generate() is called on a copy of the object, which
shares all modules and weights and has a class of its own.

B rows with R of them for each prompt, L tokens of the padded prompts, V vocabulary.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from vispec.model.arguments import number, of_kind, whole
from vispec.model.batches import SinglePrompt, new_token_limits, single_prompts
from vispec.model.collecting import Columns, StreamedTokens, streamed
from vispec.model.inputs import PER_TOKEN, forward_parameters, prompt_inputs
from vispec.model.processors import TextChoice, looks_at_text, refuse_processors
from vispec.model.rows import Round, Stop
from vispec.model.sampling import Choice, row_seeds
from vispec.model.target import Target
from vispec.timing import now

OFF = {
    "num_beams": (1, "beam search"),
    "num_beam_groups": (1, "group beam search"),
    "diversity_penalty": (0, "group beam search"),
    "penalty_alpha": (0, "contrastive search"),
    "dola_layers": (None, "DoLa decoding"),
    "prompt_lookup_num_tokens": (None, "assisted decoding"),
    "assistant_early_exit": (None, "assisted decoding"),
    "constraints": (None, "constrained beam search"),
    "force_words_ids": (None, "constrained beam search"),
    "guidance_scale": (1, "classifier-free guidance"),
    "output_attentions": (False, "attentions of all tokens"),
    "output_hidden_states": (False, "hidden states of all tokens"),
}
"""Options of a generation config that are not supported: what is off, and what they ask for."""
WHOLE = ("max_new_tokens", "max_length", "min_new_tokens", "min_length", "top_k", "num_return_sequences",
         "no_repeat_ngram_size", "encoder_no_repeat_ngram_size")  # fmt: skip
NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
           "encoder_repetition_penalty", "max_time")  # fmt: skip
KINDS = {"generation_config": (GenerationConfig,), "eos_token_id": (int, list, torch.Tensor),
         "logits_processor": (list,), "stopping_criteria": (list,)}  # fmt: skip
"""Options that are whole numbers, those that are other numbers, and those that are something else."""
NOT_TAKEN = ("inputs", "assistant_model", "assistant_tokenizer", "synced_gpus", "negative_prompt_ids",
             "negative_prompt_attention_mask", "custom_generate")  # fmt: skip
"""What has no meaning here."""

Rounds = Callable[[list[SinglePrompt], list[Stop], Choice, bool], Iterator[dict[int, Round]]]
"""Answers prompts, with a draft or without one."""


@dataclass
class SpecOutput(GenerateDecoderOnlyOutput):
    """What `return_dict_in_generate` returns; attentions, hidden_states and past_key_values are None.

    `sequences` (B, L + new); with `output_scores` and `output_logits`, a tuple of (B, V) for each new token, zeros
    behind the end of a row.
    """

    tau: float | None = None
    """Mean draft tokens accepted in a round, over all rounds with a draft and all rows; None without any."""
    acceptance_lengths: list[list[int]] | None = None
    """For each row the draft tokens accepted in its rounds with a draft."""
    rounds: int | None = None
    """Of all rows together, after the prompts' own passes."""
    seconds: float | None = None
    """After the prompts' own passes."""
    new_tokens: list[int] | None = None
    """Of each row, an end token included, padding not."""


@dataclass(frozen=True)
class Request:
    """What generate() has prepared, in our terms."""

    prompts: list[SinglePrompt]
    stops: list[Stop]
    choice: Choice
    input_ids: torch.Tensor
    """(B, L) padded prompts of all rows."""
    config: GenerationConfig
    ends: "Ends"


class Ends:
    """Stopping criteria other than end tokens and lengths, asked after each token of an answer.

    Args:
        criteria: transformers' or a user's own.
        texts: (B, L) padded prompts of all rows.
        limits: most new tokens of each row.
        together: rows go on until all of them have met a criterion, as they do in generate() where no end token is
            known.
        choice: keeps the scores that criteria are given; None: they are given none.
    """

    def __init__(
        self,
        criteria: StoppingCriteriaList,
        texts: torch.Tensor,
        limits: Sequence[int],
        together: bool,
        choice: TextChoice | None,
    ):
        self._criteria, self._limits, self._choice = criteria, limits, choice
        self._together = together
        self._texts = torch.nn.functional.pad(texts, (0, max(limits)))
        self._prompt = texts.shape[1]
        self._new = [0] * len(texts)
        self._met: list[int | None] = [None] * len(texts)
        """New tokens of each row when it met a criterion or its limit."""

    def of(self, row: int) -> Callable[[int], bool] | None:
        """What a row's `Stop` asks."""
        return (lambda token: self._ended(row, token)) if self._criteria else None

    @property
    def longest(self) -> int | None:
        """New tokens at which all rows stop together; None while that is not known, or each stops for itself."""
        return max(self._met) if self._together and None not in self._met else None

    def _ended(self, row: int, token: int) -> bool:
        new = self._new[row] = self._new[row] + 1
        end = self._prompt + new
        self._texts[row, end - 1] = token
        if self._met[row] is None:
            scores = None
            if self._choice is not None:
                scores = tuple(scores[None] for _, scores in self._choice.kept[row][:new])
            said = self._criteria(self._texts[row : row + 1, :end], scores)
            if bool(said) or new >= self._limits[row]:
                self._met[row] = new
        if not self._together:
            return self._met[row] is not None
        return self.longest is not None and new >= self.longest


# --- the target's own generate() ---


class _Prepares:
    """Put before a model's class: its generate() prepares all, `decode` decodes."""

    decode: Callable

    def _prepare_generation_config(self, *args, **kwargs):
        config, inputs = super()._prepare_generation_config(*args, **kwargs)
        refuse_modes(config)
        check_kinds(vars(config))  # before transformers goes another way
        return config, inputs

    def _expand_inputs_for_generation(self, input_ids=None, expand_size=1, is_encoder_decoder=False, **inputs):
        """Rows of one prompt share its inputs."""
        return input_ids, inputs

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        """Images stay as they are: which rows they belong to is read from sizes and grids."""
        return model_kwargs

    def _sample(self, input_ids, **request):
        return self.decode(input_ids, **request)


def generate_by(decode: Callable, target: Target, input_ids: torch.Tensor, options: Mapping, arm: Callable):
    """Let the target's generate() prepare a request, and `decode` it.

    Args:
        decode: called with (input_ids, and by name logits_processor, stopping_criteria, generation_config, streamer and
            what the target's forward takes).
        options: all other arguments of the call.
        arm: the method that was called, for messages.
    """
    for name in NOT_TAKEN:
        if options.get(name) is not None:
            raise TypeError(f"{arm.__name__}() does not take {name}")
    known = {*inspect.signature(GenerationMixin.generate).parameters, *vars(GenerationConfig()), "tokenizer"}
    known -= {"self", "kwargs", *NOT_TAKEN}
    asked = {name: value for name, value in options.items() if name in known}
    check_kinds(asked)
    inputs = {name: value for name, value in options.items() if name not in known and name not in NOT_TAKEN}
    inputs = prompt_inputs(arm, target.model, input_ids, inputs)
    # processors and criteria are made for the device of the ids, and the logits come out on this one
    inputs = {name: _on(target.device, value) for name, value in {"input_ids": input_ids, **inputs}.items()}
    model = copy.copy(target.model)
    model.__class__ = type(type(model).__name__, (_Prepares, type(model)), {"decode": staticmethod(decode)})
    return type(model).generate(model, **inputs, **asked)


def decoding_method(target: Target, rounds: Rounds) -> Callable:
    """For `custom_generate` of the target's own generate(), which then calls this in place of `_sample`.

    generate() encodes images before it decodes, and hands on no more than their features; only arguments that the
    method has by name come to it as they are. So this one has all that the target's forward takes.
    """

    def decode(model: PreTrainedModel, input_ids: torch.Tensor, **request) -> torch.Tensor | SpecOutput:
        if model is not target.model:
            raise ValueError("generate_with decodes for the target of this SpecModel alone, found another model")
        copies = request["generation_config"].num_return_sequences  # what generate() has repeated already
        shared = {name: request[name][::copies] for name in PER_TOKEN if request.get(name) is not None}
        return answer(target, rounds, input_ids[::copies], **request | shared)

    keyword = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    own = [name for name in forward_parameters(target.model) if name not in ("input_ids", *PER_TOKEN)]
    parameters = list(inspect.signature(decode).parameters.values())
    named = [keyword("seed", default=None), keyword("speculate", default=True)]
    named += [keyword(name, default=None) for name in own]
    decode.__signature__ = inspect.Signature([*parameters[:-1], *named, parameters[-1]])
    return decode


def check_kinds(options: Mapping) -> None:
    """TypeError or ValueError where an option is of another kind, or not finite; generate() checks their ranges."""
    for name, kinds in KINDS.items():
        of_kind(name, options.get(name), *kinds)
    for name, value in options.items():
        if name in (*WHOLE, *NUMBERS) and value is not None:
            whole(name, value) if name in WHOLE else number(name, value)
    ends = options.get("eos_token_id")
    for end in ends if isinstance(ends, list | tuple) else ():
        whole("eos_token_id", end)


def refuse_modes(config: GenerationConfig) -> None:
    """ValueError, with the option's name, for what is no greedy decoding or sampling of single texts."""
    for name, (off, what) in OFF.items():
        value = getattr(config, name, None)
        if value is not None and value != off:
            raise ValueError(f"{name}={value!r} asks for {what}, which draft trees cannot do")


def answer(
    target: Target,
    rounds: Rounds,
    input_ids: torch.Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    seed: int | Sequence[int] | None = None,
    speculate: bool = True,
    streamer=None,
    streams: bool = False,
    **model_inputs,
) -> torch.Tensor | SpecOutput | Iterator[StreamedTokens]:
    """What stands in place of the decoding loop of generate().

    Args:
        input_ids: (B / R, L).
        streams: give the tokens of one prompt round by round, see `SpecModel.stream`.
        model_inputs: what the target's forward takes, and what generate() adds to that.

    Raises:
        ValueError: a part of the request is not supported; the message names it.
    """
    request = _prepared(target, input_ids, seed, logits_processor, stopping_criteria, generation_config, model_inputs)
    found = rounds(request.prompts, request.stops, request.choice, speculate)
    return streamed(found) if streams else _answered(request, found, streamer, target.device)


def _prepared(
    target: Target,
    input_ids: torch.Tensor,
    seed: int | Sequence[int] | None,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_inputs: Mapping,
) -> Request:
    """What generate() hands to its decoding method, in our terms."""
    copies = generation_config.num_return_sequences
    refuse_modes(generation_config)
    past = model_inputs.get("past_key_values")
    if model_inputs.get("inputs_embeds") is not None or (past is not None and past.get_seq_length() > 0):
        raise ValueError("a prompt must be given as input_ids alone, not by inputs_embeds or past_key_values")
    taken = forward_parameters(target.model)
    inputs = {name: value for name, value in model_inputs.items() if name in taken and value is not None}
    prompts = single_prompts(target.model, input_ids, inputs)
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    texts = input_ids.repeat_interleave(copies, dim=0)
    refuse_processors(logits_processor, texts, target.lm_head.weight.shape[0])

    lengths = [one.max_length for one in stopping_criteria if isinstance(one, MaxLengthCriteria)]
    limits = new_token_limits(
        [ids.shape[1] for ids, _ in prompts],
        texts.shape[1],
        target.max_positions,
        min(lengths, default=texts.shape[1] + target.max_positions) - texts.shape[1],
        None,
    )
    seeds = row_seeds(seed, len(texts)) if generation_config.do_sample else None
    keeps = generation_config.return_dict_in_generate and (
        generation_config.output_scores or generation_config.output_logits
    )
    choice = Choice(logits_processor, seeds)
    if keeps or any(map(looks_at_text, logits_processor)):
        choice = TextChoice(logits_processor, seeds, texts, limits, bool(keeps))
    eos = [one for one in stopping_criteria if type(one) is EosTokenCriteria]
    others = [one for one in stopping_criteria if one not in eos and not isinstance(one, MaxLengthCriteria)]
    told = choice if keeps and generation_config.output_scores else None
    pads = any(hasattr(one, "eos_token_id") for one in stopping_criteria)  # generate() asks for this very attribute
    ends = Ends(StoppingCriteriaList(others), texts, limits, bool(others) and len(texts) > 1 and not pads, told)
    end_tokens = frozenset(token for one in eos for token in one.eos_token_id.tolist())
    stops = [Stop(limit, end_tokens, ends.of(row)) for row, limit in enumerate(limits)]
    return Request(prompts, stops, choice, texts, generation_config, ends)


def _answered(
    request: Request, rounds: Iterator[dict[int, Round]], streamer, device: torch.device
) -> torch.Tensor | SpecOutput:
    """Run the rounds of a request; returns what generate() returns."""
    rows = range(len(request.stops))
    padding = request.config._pad_token_tensor
    columns = Columns(len(rows), request.ends, 0 if padding is None else int(padding), streamer)
    columns.add(next(rounds))
    start, number = now(device), 0
    lengths: list[list[int]] = [[] for _ in rows]
    for step in rounds:
        number += 1
        for row, one in step.items():
            if one.drafted:
                lengths[row].append(one.accepted)
        columns.add(step)
    seconds = now(device) - start
    if streamer is not None:
        streamer.end()
    sequences = torch.cat([request.input_ids, columns.tensor().to(request.input_ids)], dim=1)
    if not request.config.return_dict_in_generate:
        return sequences
    logits = scores = None
    if request.config.output_scores or request.config.output_logits:
        new = range(sequences.shape[1] - request.input_ids.shape[1])
        kept = [request.choice.kept[row][: len(columns.answers[row])] for row in rows]
        logits, scores = (tuple(_stacked(kept, place, which) for place in new) for which in (0, 1))
    return SpecOutput(
        sequences=sequences,
        scores=scores if request.config.output_scores else None,
        logits=logits if request.config.output_logits else None,
        tau=fmean(accepted) if (accepted := sum(lengths, [])) else None,
        acceptance_lengths=lengths,
        rounds=number,
        seconds=seconds,
        new_tokens=columns.lengths(),
    )


def _stacked(kept: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]], place: int, which: int) -> torch.Tensor:
    """(B, V) of one new token."""
    values = [row[place][which] if place < len(row) else None for row in kept]
    like = next(value for value in values if value is not None)
    return torch.stack([torch.zeros_like(like) if value is None else value for value in values])


def _on(device: torch.device, value):
    return value.to(device) if isinstance(value, torch.Tensor) else value
