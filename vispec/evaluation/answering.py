"""Answering a benchmark's questions and filling answer files: the loop that all command lines share.

An answer file holds a series, a method's answers to a benchmark's questions. Series that are to be compared are filled
together: they take turns question by question over one loaded target, so that a drifting machine hurts all alike. A
command with a single method is the same loop with one series.
"""

import gc
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from vispec.cli import DONE, ERROR, WITH_FAILURES, UserError, one_line
from vispec.evaluation.answer_lines import answer_line
from vispec.evaluation.answers import AnswerFile
from vispec.evaluation.benchmarks import BENCHMARKS, Benchmark, Question
from vispec.evaluation.loading import (
    Models,
    Tree,
    as_noted,
    load_models,
    loaded_settings,
    quiet_transformers,
    weights_sha256,
)
from vispec.evaluation.lossless import RERUN_FAILS
from vispec.evaluation.measure import Answer, Generation, answer_question
from vispec.evaluation.text import answer_text
from vispec.pictures import UnreadableImage
from vispec.prompts import build_inputs, load_processor
from vispec.timing import in_turn
from vispec.weights_digest import target_revision

if TYPE_CHECKING:
    from transformers import BatchFeature

WARM_UPS = 3
"""Answers that each series gives to its first question before they count."""
TUNED_ON = 3
"""Questions on which `--tree tune` measures trees."""


@dataclass(frozen=True)
class Series:
    """A method's answers to a benchmark's questions: what one answer file holds."""

    benchmark: str
    method: str
    model_id: str
    """Names the answers."""
    generation: Generation
    num_choices: int = 1


@dataclass(frozen=True)
class Task:
    """An answer file to be filled."""

    series: Series
    file: AnswerFile
    settings: dict
    """Without what only loaded models tell, see `UNKNOWN_BEFORE_LOADING`."""

    def check(self, loaded: Mapping[str, Mapping] | None = None) -> None:
        """Refuse a file that was made with other settings, as far as they are known.

        Args:
            loaded: what loaded models tell, see `AnswersQuestions.loaded_settings`; the series' method may lack.

        Raises:
            UserError: it names the setting.
        """
        known = self.settings
        if loaded:
            known = known | loaded.get(self.series.method, loaded["baseline"])
        self.file.check(known, tuple(name for name in UNKNOWN_BEFORE_LOADING if name not in known))


@dataclass(frozen=True)
class Ask:
    """A question, and the series that have no answer to it yet, in the order in which they take turns."""

    question: Question
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Answered:
    """The line for a series' answer file."""

    series: Series
    line: dict


@dataclass(frozen=True)
class LeftOut:
    """A question that gets no answer."""

    question_id: int | str
    reason: str
    kind: Literal["unreadable", "too long", "failed", "died"]
    """Its image cannot be read, its prompt does not fit the target's positions, something was raised, or actors died of
    it. The last two may be otherwise next time."""


class AnswersQuestions(Protocol):
    """Loaded models, in this process or in others."""

    def loaded_settings(self) -> dict[str, dict]:
        """For each method that is loaded, the settings that only loaded models tell."""

    def answers(self, asks: Sequence[Ask]) -> Iterator[tuple[Ask, list[Answered | LeftOut]]]:
        """Answer the questions; in which order is not said."""


UNKNOWN_BEFORE_LOADING = (
    "base_model_revision", "dtype", "device", "device_type", "devices", "layers", "tree", "draft_vocab",
    "spec_model_sha256",
)  # fmt: skip


class Answerer:
    """A loaded target with its drafts, which answers in this process."""

    def __init__(self, models: Models):
        quiet_transformers()
        self._path, self._asked = models.base_model_path, models
        self._models = load_models(models)
        self._processors: dict[bool, object] = {}
        self._warm: set[Series] = set()
        self._ready: dict[str, tuple[int, int]] = {}
        """Tokens of the shortest and of the longest prompt that a method is ready for."""

    def loaded_settings(self) -> dict[str, dict]:
        return {name: loaded_settings(model, self._asked, name) for name, model in self._models.items()}

    def answers(self, asks: Sequence[Ask]) -> Iterator[tuple[Ask, list[Answered | LeftOut]]]:
        for ask in asks:
            yield ask, self.answer(ask)

    def answer(self, ask: Ask) -> list[Answered | LeftOut]:
        """Answer a question by each of its series in turn; if one of them fails, it is left out of all."""
        name = ask.question.question_id
        try:
            return self._answer(ask)
        except UserError:  # holds for all questions
            raise
        except UnreadableImage as error:
            return [LeftOut(name, one_line(error), "unreadable")]
        except Exception as error:  # whatever it is, the other questions are to be answered
            return [LeftOut(name, f"{type(error).__name__}: {one_line(error)}", "failed")]

    def _answer(self, ask: Ask) -> list[Answered | LeftOut]:
        question, processor = ask.question, self._processor(ask.series[0].benchmark)
        inputs = build_inputs(processor, question.turns)
        length, positions = inputs["input_ids"].shape[1], self._models["baseline"].target.max_positions
        if length > positions:
            reason = f"the prompt has {length} tokens, the target has {positions} positions"
            return [LeftOut(question.question_id, reason, "too long")]
        for series in ask.series:
            self._get_ready(series, inputs, positions)
        answered = []
        for series in ask.series:
            answers: list[tuple[Answer, str, str]] = []
            for seed in range(series.num_choices):
                answer = self._measure(series, inputs, seed)
                text = answer_text(processor.tokenizer, answer.output_ids)
                answers.append((answer, text, self._models[series.method].captured))
            line = answer_line(question.question_id, series.model_id, series.method, answers)
            answered.append(Answered(series, line))
        return answered

    def _get_ready(self, series: Series, inputs: "BatchFeature", positions: int) -> None:
        """Choose kernels and capture steps for an answer of any length, if a prompt of this one has not come yet."""
        length = inputs["input_ids"].shape[1]
        shortest, longest = self._ready.get(series.method, (length, length))
        if series.method not in self._ready or not shortest <= length <= longest:
            shortest, longest = min(shortest, length), max(longest, length)
            end = min(longest + series.generation.max_new_tokens, positions)
            self._models[series.method].warmup(shortest, end - shortest)
            self._ready[series.method] = shortest, longest
        if series not in self._warm:
            for _ in range(WARM_UPS):
                self._measure(series, inputs)
            self._warm.add(series)

    def tune(self, method: str, benchmark: str, questions: Sequence[Question]) -> tuple[Tree, list[int | str]]:
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
        return astuple(tuning.shape), list(prompts)

    def ids_of_both_arms(self, series: Series, question: Question) -> tuple[list[int], list[int]]:
        """Output ids of the baseline and of the series' method."""
        inputs = build_inputs(self._processor(series.benchmark), question.turns)
        model, generation = self._models[series.method], series.generation
        plain, ours = (answer_question(model, inputs, arm, generation).output_ids for arm in ("baseline", "spec"))
        return plain, ours

    def _measure(self, series: Series, inputs: "BatchFeature", seed: int = 0) -> Answer:
        arm = "baseline" if series.method == "baseline" else "spec"
        return answer_question(self._models[series.method], inputs, arm, series.generation, seed)

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

    def ids_of_both_arms(self, series: Series, question: Question) -> tuple[list[int], list[int]]:
        """Output ids of the baseline and of the series' method.

        Raises:
            UserError: the models cannot be had in float32; a second time this is said without another try.
        """
        if self._answerer is None and self._obstacle is None:
            self._load()
        if self._obstacle is not None:
            raise UserError(self._obstacle)
        return self._answerer.ids_of_both_arms(series, question)

    def _load(self) -> None:
        from transformers import AutoConfig

        path = self._models.base_model_path
        try:
            if getattr(AutoConfig.from_pretrained(path), "quantization_config", None) is not None:
                self._obstacle = f"{path} is quantised"
                return
            gc.collect()  # what answered before may still be there
            self._answerer = Answerer(self._models)
        except RERUN_FAILS as error:
            self._obstacle = one_line(error)


def settings_of(series: Series, models: Models, data: str, options: Mapping) -> dict:
    """What must not change within an answer file, as far as it is known before loading.

    Args:
        data: where the questions come from.
        options: values of the benchmark's own flags.
    """
    settings = {
        "benchmark": series.benchmark,
        "data": data,
        "method": series.method,
        "base_model": _absolute(models.base_model_path),
        "temperature": series.generation.temperature,
        "max_new_tokens": series.generation.max_new_tokens,
        "num_choices": series.num_choices,
    }
    if Path(models.base_model_path).is_dir():  # a retrained target shows before minutes of loading
        settings["base_model_revision"] = target_revision(models.base_model_path)
    if series.generation.own_config:
        settings["generation_config"] = True
    if options:
        settings["benchmark_options"] = dict(options)
    if models.dtype != "auto":
        settings["dtype"] = models.dtype
    if series.method != "baseline":
        settings["asked_tree"] = as_noted(models.tree_of(series.method))  # what a draft can fill of it may be less
        draft = models.drafts[series.method]
        if draft is not None:
            place = models.place_of(series.method)
            settings["spec_model"] = _absolute(draft)
            settings |= {f"spec_{name}": value for name, value in place.items()}
            if Path(draft).is_dir():  # a retrained head as well
                settings["spec_model_sha256"] = weights_sha256(draft, place)
    return settings


def open_asks(tasks: Sequence[Task], questions: Sequence[Question]) -> list[Ask]:
    """What is not answered yet; the series that have a question take turns, see `in_turn`."""
    asks = []
    for number, question in enumerate(questions):
        series = tuple(task.series for task in in_turn(tasks, number) if question.question_id not in task.file.lines)
        if series:
            asks.append(Ask(question, series))
    return asks


def answer_all(
    tasks: Sequence[Task], questions: Sequence[Question], answerer: AnswersQuestions, made_by: dict, title: str
) -> list[LeftOut]:
    """Append the answers that the files of a benchmark lack; returns the questions that get none.

    Args:
        made_by: provenance of this run.
        title: stands beside the progress bar.
    """
    from tqdm import tqdm

    asks = open_asks(tasks, questions)
    unfinished = {series for ask in asks for series in ask.series}
    files = {task.series: task.file for task in tasks if task.series in unfinished}
    loaded = answerer.loaded_settings()
    for task in tasks:
        task.check(loaded)
    for task in tasks:
        if task.series in files:
            task.file.begin(task.settings | loaded[task.series.method], made_by)
    left_out = []
    for ask, outcomes in tqdm(answerer.answers(asks), total=len(asks), desc=title, unit="question"):
        for outcome in outcomes:
            if isinstance(outcome, Answered):
                files[outcome.series].append(outcome.line)
            else:
                left_out.append(outcome)
                for series in ask.series:
                    files[series].leave_out(outcome.question_id, outcome.reason)
                tqdm.write(f"question {ask.question.question_id} is left out: {outcome.reason}", file=sys.stderr)
    return left_out


def finish(task: Task, asked: int, left_out: Sequence[LeftOut]) -> int:
    """Bring an answer file into its final order, print how much of what was asked is answered; returns an exit code."""
    task.file.finish()
    answered = asked - len({one.question_id for one in left_out} - task.file.lines.keys())
    print(f"{answered} of {asked} questions answered: {task.file.path}")
    if asked and not answered:
        print(f"error: no question has an answer: {task.file.path}", file=sys.stderr)
    return DONE if answered or not asked else ERROR


def report_left_out(benchmark: Benchmark, left_out: Sequence[LeftOut]) -> int:
    """Print which questions have no answer, and why; returns an exit code."""
    names: dict[str, list[str]] = defaultdict(list)
    for one in left_out:
        names[one.kind].append(str(one.question_id))
    if "too long" in names:
        print(f"left out, because their prompt does not fit the target's positions: {', '.join(names['too long'])}")
    if "unreadable" in names:
        print(f"left out, because their image cannot be read: {', '.join(names['unreadable'])}")
        print(f"the files of {benchmark.name} can be had from {benchmark.source}")
    for kind, reason in (("failed", "something failed, see above"), ("died", "the actors that tried died")):
        if kind in names:
            print(f"error: not answered, because {reason}: {', '.join(names[kind])}", file=sys.stderr)
    return WITH_FAILURES if {"failed", "died"} & names.keys() else DONE


def _absolute(path: str) -> str:
    """A local folder by its full path, a hub id as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
