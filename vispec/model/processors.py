"""Transformers' logits processors on a draft tree: what the target says at a node depends on the text that leads there.

Only one path of a tree can be kept, so processors are asked along that path alone: at the root, then at the child that
has the token which was chosen there, and so on. Each of them is thus called as generate() calls it, once for each token
of the answer, with the text before that token; texts that a grammar rules out never reach it. That takes a transfer
from the device for each of these tokens, so a generation whose processors do not look at the text goes by `Choice`.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import transformers
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from vispec.model.rows import Answer
from vispec.model.sampling import Choice, draw
from vispec.model.tree import Tree

WITHOUT_TEXT = (
    transformers.TemperatureLogitsWarper,
    transformers.TopKLogitsWarper,
    transformers.TopPLogitsWarper,
    transformers.MinPLogitsWarper,
    transformers.TypicalLogitsWarper,
    transformers.EpsilonLogitsWarper,
    transformers.EtaLogitsWarper,
    transformers.InfNanRemoveLogitsProcessor,
    transformers.LogitNormalization,
    transformers.SuppressTokensLogitsProcessor,
)
"""They look at the scores alone, so they are applied to all nodes at once."""
REFUSED = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "runs the target a second time for each token",
    "ClassifierFreeGuidanceLogitsProcessor": "takes the scores of a second prompt beside each one",
    "HammingDiversityLogitsProcessor": "compares the beams of a search",
}
"""Processors that need more than a text and its scores, by their class."""
REFUSED_IN_BATCHES = {"SynthIDTextWatermarkLogitsProcessor": "remembers what it has seen of all rows together"}
"""In a batch, rows go on at different paces."""
TEXT_OPTIONS = {
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None, "min_length": 0,
    "min_new_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "watermarking_config": None, "stop_strings": None, "guidance_scale": 1, "num_beams": 1, "num_beam_groups": 1,
    "diversity_penalty": 0, "penalty_alpha": 0, "dola_layers": None, "constraints": None, "force_words_ids": None,
}  # fmt: skip
"""Options of a generation config that change greedy answers, and what is off."""


def text_options(config: GenerationConfig) -> list[str]:
    """What a generation config asks for that changes greedy answers: "name=value", end tokens and lengths apart."""
    asked = {name: getattr(config, name, None) for name in TEXT_OPTIONS}
    return [f"{name}={value}" for name, value in asked.items() if value not in (None, TEXT_OPTIONS[name])]


def looks_at_text(processor: LogitsProcessor) -> bool:
    return type(processor) not in WITHOUT_TEXT


def refuse_processors(processors: Sequence[LogitsProcessor], texts: torch.Tensor, vocabulary: int) -> None:
    """Refuse processors that would do something else here than in generate().

    Args:
        texts: (B, L) padded prompts.

    Raises:
        TypeError: one of them is none.
        ValueError: it names the processor's class.
    """
    for processor in processors:
        name = type(processor).__name__
        if not callable(processor):
            raise TypeError(f"logits_processor must hold what can be called, found {processor!r:.60}")
        reason = REFUSED.get(name) or (REFUSED_IN_BATCHES.get(name) if len(texts) > 1 else None)
        if reason is not None:
            raise ValueError(f"{name} {reason}, which draft trees cannot do")
        if len(texts) > 1 and not type(processor).__module__.startswith("transformers."):
            _refuse_by_place(processor, texts, vocabulary)


def _refuse_by_place(processor: LogitsProcessor, texts: torch.Tensor, vocabulary: int) -> None:
    """A user's own processor meets the rows of a batch in groups that change, so a row's place may not matter to it."""
    scores = torch.randn(len(texts), vocabulary, generator=torch.Generator().manual_seed(0)).to(texts.device)
    together = processor(texts, scores.clone())
    last = processor(texts[-1:], scores[-1:].clone())
    if not torch.allclose(together[-1:], last, equal_nan=True):
        raise ValueError(
            f"{type(processor).__name__} does not treat a row of a batch as it treats the row alone; rows go on at "
            "different paces here, so a processor may look at a row's own text and scores only"
        )


class TextChoice(Choice):
    """Chooses by processors that look at the text, or keeps the scores of what was chosen.

    Args:
        processors: all of the generation, warpers included, in order.
        seeds: see `Choice`.
        texts: (B, L) prompts of all rows, padded on the left to one length.
        limits: most new tokens of each row.
        keeps: whether logits and scores of all that is chosen are kept.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        seeds: Sequence[int] | None,
        texts: torch.Tensor,
        limits: Sequence[int],
        keeps: bool,
    ):
        super().__init__(processors, seeds)
        self._rows, self._length = texts.shape
        self._texts = F.pad(texts, (0, max(limits)))
        self._keeps = keeps
        self.kept: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in limits]
        """For each row and token, those before it included, logits (V,) and scores (V,)."""

    def choose(self, logits: torch.Tensor, answers: Sequence[Answer], tree: Tree | None = None) -> torch.Tensor:
        # at nodes that are not reached some token of the vocabulary, since steps on a GPU look up surplus ones too
        chosen = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
        children = [{} for _ in answers] if tree is None else _children(tree)
        reached, depth = [(place, 0) for place in range(len(answers))], 0
        while reached:
            # processors read the length of a text, so texts of one length go together
            alike = defaultdict(list)
            for place, node in reached:
                alike[answers[place].new].append((place, node))
            reached = []
            for group in alike.values():
                places, nodes = map(list, zip(*group, strict=True))
                named = self._say([answers[place] for place in places], depth, logits[places, nodes])
                chosen[places, nodes] = named.to(chosen.device)
                for place, node, token in zip(places, nodes, named.tolist(), strict=True):
                    child, answer = children[place].get((node, token)), answers[place]
                    ended = token in answer.stop.eos_token_ids or answer.new + depth + 1 >= answer.stop.max_new_tokens
                    if child is not None and not ended:
                        reached.append((place, child))
            depth += 1
        return chosen

    def _say(self, answers: Sequence[Answer], depth: int, logits: torch.Tensor) -> torch.Tensor:
        """The tokens (n,) of rows of equal length, `depth` tokens after their newest ones; logits (n, V)."""
        rows, end = [answer.row for answer in answers], self._length + answers[0].new + depth
        logits = logits.float().to(self._texts.device)  # where processors have been made for
        scores = self._of_rows(rows)(self._texts[rows, :end], logits)
        if self.seeds is None:
            named = scores.argmax(-1)
        else:
            named = draw(scores, self.noise(answers, [depth], scores)[:, 0])
        self._texts[rows, end] = named
        if self._keeps:
            for row, *values in zip(rows, logits, scores, strict=True):
                self.kept[row].append(tuple(values))
        return named

    def _of_rows(self, rows: Sequence[int]) -> LogitsProcessorList:
        """The processors as they are called with the texts of these rows."""
        if self._rows == 1:
            return self.warpers
        return LogitsProcessorList(_of_rows(processor, rows, self._rows) for processor in self.warpers)


def _children(tree: Tree) -> list[dict[tuple[int, int], int]]:
    """For each row, (node, token) -> the child of the node that has this token."""
    return [
        {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True)) if node > 0}
        for parents, tokens in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)
    ]


def _of_rows(processor: LogitsProcessor, rows: Sequence[int], total: int) -> LogitsProcessor:
    """Those of transformers' processors that know the rows of a batch, as they are for some of its rows."""

    def entries(known: int) -> list[int]:
        """Where what is known of each row's prompt is; neighbours may share it."""
        return [row * known // total for row in rows]

    found = copy.copy(processor)
    if type(processor) is transformers.PrefixConstrainedLogitsProcessor:
        found._prefix_allowed_tokens_fn = _numbered(processor._prefix_allowed_tokens_fn, rows)
    elif isinstance(getattr(processor, "prompt_ignore_length", None), torch.Tensor):  # of a repetition penalty
        found.prompt_ignore_length = processor.prompt_ignore_length[entries(len(processor.prompt_ignore_length))]
    elif type(processor) is transformers.EncoderRepetitionPenaltyLogitsProcessor:
        found.encoder_input_ids = processor.encoder_input_ids[entries(len(processor.encoder_input_ids))]
    elif type(processor) is transformers.EncoderNoRepeatNGramLogitsProcessor:
        found.generated_ngrams = [processor.generated_ngrams[entry] for entry in entries(processor.batch_size)]
        found.batch_size = len(rows)
    else:
        return processor
    return found


def _numbered(allowed: Callable[[int, torch.Tensor], list[int]], rows: Sequence[int]) -> Callable:
    return lambda number, text: allowed(rows[number], text)
