"""Loaded models that answer the questions of benchmarks.

Methods that are to be compared take turns question by question over one loaded target, so that a drifting machine hurts
all alike.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from vispec.cli import UserError, one_line
from vispec.evaluation.answer_file import QuestionId, choice_of
from vispec.evaluation.benchmarks import BENCHMARKS, Question
from vispec.evaluation.loading import Models, keep_prompts, load_models, quiet_transformers
from vispec.evaluation.lossless import RERUN_FAILS
from vispec.evaluation.measure import Answer, Generation, answer_question
from vispec.evaluation.settings import loaded_settings
from vispec.methods import UNDRAFTED
from vispec.model.shape import TreeShape
from vispec.pictures import UnreadableImage
from vispec.prompts import RefusedPrompt, Turn, build_inputs, load_processor
from vispec.text import answer_text

if TYPE_CHECKING:
    from transformers import BatchFeature

WARM_UPS = 3
"""Answers that each method gives to a benchmark's first question before they count."""
TUNED_ON = 3
"""Questions on which `--tree tune` measures trees."""


@dataclass(frozen=True)
class Ask:
    """A question, how it is asked, and the methods that have no answer to it yet, in the order in which they answer."""

    question: Question
    benchmark: str
    generation: Generation
    num_choices: int
    methods: tuple[str, ...]


@dataclass(frozen=True)
class LeftOut:
    """A question that gets no answer."""

    question_id: QuestionId
    reason: str
    kind: Literal["unreadable", "refused", "too long", "failed", "died"]
    """Its image cannot be read, the target's processor cannot take its prompt, that does not fit the target's
    positions, something was raised, or actors died of it. The last two may be otherwise next time."""


Outcome = dict[str, list[dict]] | LeftOut
"""By method the choices of a line, see `choice_of`; or none."""


class TooLong(ValueError):
    """A prompt does not fit the target's positions."""


class Answerer:
    """A loaded target with its drafts, which answers in this process."""

    def __init__(self, models: Models):
        quiet_transformers()
        self._path, self._asked = models.base_model_path, models
        self._models = load_models(models)
        keep_prompts(self._models["baseline"], models.prefix_cache)
        self._processors: dict[bool, object] = {}
        self._warm: set[tuple[str, Generation, str]] = set()
        self._ready: dict[str, tuple[int, int]] = {}
        """Tokens of the shortest and of the longest prompt that a method is ready for."""

    def loaded_settings(self) -> dict[str, dict]:
        """For each method that is loaded, the settings that only loaded models tell."""
        return {name: loaded_settings(model, self._asked, name) for name, model in self._models.items()}

    def answers(self, asks: Sequence[Ask]) -> Iterator[tuple[Ask, Outcome]]:
        """Answer the questions."""
        for ask in asks:
            yield ask, self.answer(ask)

    def answer(self, ask: Ask) -> Outcome:
        """Answer a question by each of its methods in turn; if one of them fails, it is left out of all."""
        name = ask.question.question_id
        try:
            return self._answer(ask)
        except UserError:  # holds for all questions
            raise
        except UnreadableImage as error:
            return LeftOut(name, one_line(error), "unreadable")
        except RefusedPrompt as error:
            return LeftOut(name, one_line(error), "refused")
        except TooLong as error:
            return LeftOut(name, str(error), "too long")
        except Exception as error:  # whatever it is, the other questions are to be answered
            return LeftOut(name, f"{type(error).__name__}: {one_line(error)}", "failed")

    def _answer(self, ask: Ask) -> Outcome:
        inputs = self._inputs(ask, ask.question.turns)
        for method in ask.methods:
            self._get_ready(ask, method, inputs)
        choices: dict[str, list[dict]] = {method: [] for method in ask.methods}
        for method, found in choices.items():
            for seed in range(ask.num_choices):
                answers, texts = zip(*self._converse(ask, method, inputs, seed), strict=True)
                found.append(choice_of(answers, texts, self._models[method], method))
        return choices

    def _converse(self, ask: Ask, method: str, inputs: "BatchFeature", seed: int = 0) -> Iterator[tuple[Answer, str]]:
        """A method's answer to each of the user's turns, with its text; what it said before is in the context.

        Args:
            inputs: of the first turn.
        """
        if (prefixes := self._models["baseline"].target.prefixes) is not None:
            prefixes.clear()  # of other arms, and of other answers to the same question
        tokenizer, turns = self._processor(ask.benchmark).tokenizer, ask.question.turns
        answer = self._measure(ask, method, inputs, seed)
        yield answer, (text := answer_text(tokenizer, answer.output_ids))
        for turn in ask.question.further:
            turns = (*turns, Turn("assistant", (text,)), turn)
            inputs = self._inputs(ask, turns)
            self._get_ready(ask, method, inputs)
            answer = self._measure(ask, method, inputs, seed)
            yield answer, (text := answer_text(tokenizer, answer.output_ids))

    def _inputs(self, ask: Ask, turns: Sequence[Turn]) -> "BatchFeature":
        """Raises TooLong where the target has too few positions for a conversation."""
        inputs = build_inputs(self._processor(ask.benchmark), turns)
        length, positions = inputs["input_ids"].shape[1], self._models["baseline"].target.max_positions
        if length > positions:
            raise TooLong(f"the prompt has {length} tokens, the target has {positions} positions")
        return inputs

    def _get_ready(self, ask: Ask, method: str, inputs: "BatchFeature") -> None:
        """Choose kernels and capture steps for an answer of any length, if a prompt of this one has not come yet."""
        length, positions = inputs["input_ids"].shape[1], self._models["baseline"].target.max_positions
        shortest, longest = self._ready.get(method, (length, length))
        if method not in self._ready or not shortest <= length <= longest:
            shortest, longest = min(shortest, length), max(longest, length)
            end = min(longest + ask.generation.max_new_tokens, positions)
            self._models[method].warmup(shortest, end - shortest)
            self._ready[method] = shortest, longest
        warm = ask.benchmark, ask.generation, method
        if warm not in self._warm:
            for _ in range(WARM_UPS):
                self._measure(ask, method, inputs)
            self._warm.add(warm)

    def tune(self, method: str, benchmark: str, questions: Sequence[Question]) -> tuple[TreeShape, list[QuestionId]]:
        """Measure on a benchmark's first questions which tree is the fastest; the method answers by it from now on.

        Returns:
            The tree, and the ids of the questions.
        """
        model, processor = self._models[method], self._processor(benchmark)
        prompts = {}
        for question in questions:
            if len(prompts) == TUNED_ON:
                break
            try:
                inputs = build_inputs(processor, question.turns)
            except UserError:
                raise
            except Exception:  # what cannot be asked is said where it is answered
                continue
            if inputs["input_ids"].shape[1] <= model.target.max_positions:
                prompts[question.question_id] = inputs
        tuning = model.tune(list(prompts.values()))
        print(tuning.report())
        return tuning.shape, list(prompts)

    def ids_of(self, ask: Ask) -> list[list[int]]:
        """Output ids of each of the methods, those of all turns one behind the other."""
        inputs = self._inputs(ask, ask.question.turns)
        return [
            [token for answer, _ in self._converse(ask, method, inputs) for token in answer.output_ids]
            for method in ask.methods
        ]

    def _measure(self, ask: Ask, method: str, inputs: "BatchFeature", seed: int = 0) -> Answer:
        arm = method if method in UNDRAFTED else "spec"
        return answer_question(self._models[method], inputs, arm, ask.generation, seed)

    def _processor(self, benchmark: str):
        limits = BENCHMARKS[benchmark].pixel_limits
        if limits not in self._processors:
            self._processors[limits] = load_processor(self._path, limits)
        return self._processors[limits]


class InFloat32:
    """The target and its drafts once more in float32, read from their files when a question is asked.

    Converting loaded models there and back would leave nothing behind either, but needs room for both at once.
    """

    def __init__(self, models: Models):
        self._models = replace(models, dtype="float32")
        self._answerer: Answerer | None = None
        self._obstacle: str | None = None

    def ids_of(self, ask: Ask) -> list[list[int]]:
        """Output ids of each of the methods.

        Raises:
            UserError: the models cannot be had in float32; a second time this is said without another try.
        """
        if self._answerer is None and self._obstacle is None:
            self._load()
        if self._obstacle is not None:
            raise UserError(self._obstacle)
        return self._answerer.ids_of(ask)

    def _load(self) -> None:
        from vispec.model.loading import load_config

        path = self._models.base_model_path
        try:
            if getattr(load_config(path), "quantization_config", None) is not None:
                self._obstacle = f"{path} is quantised"
                return
            gc.collect()  # what answered before may still be there
            self._answerer = Answerer(self._models)
        except RERUN_FAILS as error:
            self._obstacle = one_line(error)
