"""Filling answer files: what all commands that answer benchmarks do once they know what is asked.

The methods whose answers are to be compared are filled together, question by question. A command with a single method
is the same with one file.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, product, starmap
from pathlib import Path

from vispec.cli import DONE, ERROR, WITH_FAILURES, UserError, provenance, worst
from vispec.evaluation.actors import Actors, loaded
from vispec.evaluation.answer_file import QuestionId, condition_notices
from vispec.evaluation.answerer import Answerer, Ask, InFloat32, LeftOut
from vispec.evaluation.benchmarks import Benchmark, Question
from vispec.evaluation.loading import Models
from vispec.evaluation.lossless import check_lossless, wants_check
from vispec.evaluation.measure import Generation
from vispec.evaluation.measured_trees import keep_trees, measure_trees, tuning_set
from vispec.evaluation.settings import asked_settings
from vispec.evaluation.task import Task
from vispec.methods import GENERATE
from vispec.timing import in_turn


@dataclass
class Plan:
    """A benchmark at a temperature: the questions that are asked, and one answer file a method."""

    benchmark: Benchmark
    options: Mapping
    """Values of the benchmark's own flags."""
    all_questions: Sequence[Question]
    data: str
    """Where the questions come from."""
    asked: slice
    generation: Generation
    num_choices: int = 1
    tasks: list[Task] = field(default_factory=list)

    def add(self, models: Models, method: str, path: Path, model_id: str) -> None:
        """Let a method of `models` answer too, see `Task`."""
        if models.prefix_cache and not any(question.further for question in self.all_questions):
            raise UserError(f"--prefix-cache: {self.benchmark.name} has no conversations, whose turns share something")
        if models.prefix_cache and method == GENERATE:
            raise UserError(f"--prefix-cache: {GENERATE}, transformers' own loop, reads every turn whole")
        terms = self.benchmark.name, self.data, self.options, self.generation, self.num_choices
        settings = asked_settings(models, method, *terms)
        self.tasks.append(Task(path, settings, model_id, self.benchmark.authors_row))

    @property
    def questions(self) -> Sequence[Question]:
        return self.all_questions[self.asked]

    def open_asks(self) -> list[Ask]:
        """What is not answered yet; the methods that lack an answer take turns, see `in_turn`."""
        asks = []
        for number, question in enumerate(self.questions):
            methods = [task.method for task in in_turn(self.tasks, number) if question.question_id not in task.lines]
            if methods:
                asks.append(self._ask(question, *methods))
        return asks

    @property
    def open_methods(self) -> set[str]:
        """Methods that lack answers."""
        return {method for ask in self.open_asks() for method in ask.methods}

    def ask_again(self, question_id: QuestionId, method: str) -> Ask:
        """A question that has been answered, for the baseline and a method.

        Raises:
            UserError: the data have changed since.
        """
        for question in self.all_questions:
            if question.question_id == question_id:
                return self._ask(question, "baseline", method)
        raise UserError(f"it is not among the questions of {self.data} any more")

    def _ask(self, question: Question, *methods: str) -> Ask:
        return Ask(question, self.benchmark.name, self.generation, self.num_choices, methods)

    def finish(self, left_out: Sequence[LeftOut] = ()) -> int:
        """Bring the files into order; print how much of what was asked is answered, and what arms differ in.

        Returns:
            An exit code.
        """
        codes, asked = [DONE], len(self.questions)
        for task in self.tasks:
            task.finish()
            answered = asked - len({one.question_id for one in left_out} - task.lines.keys())
            print(f"{answered} of {asked} questions answered: {task.path}")
            if asked and not answered:
                print(f"error: no question has an answer: {task.path}", file=sys.stderr)
                codes.append(ERROR)
        plain = [task for task in self.tasks if task.method == "baseline"]
        for notice in chain.from_iterable(starmap(condition_notices, product(plain, self.tasks))):
            print(f"notice: {notice}", file=sys.stderr)
        return worst(*codes, _report_left_out(self.benchmark, left_out))


def run(
    plans: Sequence[Plan],
    models: Models,
    args: argparse.Namespace,
    folder_of: Callable[[Benchmark], str | None],
    lossless: bool | None = None,
) -> int:
    """Fill the answer files of all plans; returns an exit code.

    Args:
        args: flags, those of `add_common_flags` among them.
        folder_of: where the data of a benchmark are looked for on whose questions trees are measured.
        lossless: what --check-lossless says.
    """
    tasks = list(chain.from_iterable(plan.tasks for plan in plans))
    with ExitStack() as held:
        for task in tasks:
            held.enter_context(task.alone())
        models = keep_trees(tasks, models)
        for task in tasks:
            task.check()
        code = _answer(plans, tasks, models, args, folder_of)
        # the models are gone by now, so that there is room for float32
        return code if _check_lossless(plans, models, lossless) else ERROR


def _answer(
    plans: Sequence[Plan],
    tasks: Sequence[Task],
    models: Models,
    args: argparse.Namespace,
    folder_of: Callable[[Benchmark], str | None],
) -> int:
    unfinished = []
    for plan in plans:
        if plan.open_methods:
            unfinished.append(plan)
        else:
            plan.finish()
    if not unfinished:
        return DONE
    methods = set().union(*(plan.open_methods for plan in unfinished))
    models = replace(models, drafts={m: path for m, path in models.drafts.items() if m in methods})
    reported = {(plan.benchmark.name, plan.data): plan.options for plan in plans}
    tuned_on = tuning_set(models, getattr(args, "tune_on", None), reported, folder_of, args.num_gpus_total)
    made_by = provenance(args)
    code = DONE
    with loaded(models, args.num_gpus_total) as answerer:
        measure_trees(tasks, tuned_on, models, answerer)
        found = answerer.loaded_settings()
        for task in tasks:
            task.check(found)  # so that none is refused hours later
        for number, plan in enumerate(unfinished, start=1):
            title = f"{number}/{len(unfinished)} {plan.benchmark.name} T={plan.generation.temperature:g}"
            code = worst(code, plan.finish(_fill(plan, answerer, found, made_by, title)))
    return code


def _fill(plan: Plan, answerer: Answerer | Actors, found: Mapping, made_by: dict, title: str) -> list[LeftOut]:
    """Append the answers that the files of a plan lack; returns the questions that get none.

    Args:
        found: what loaded models tell, by method.
        made_by: provenance of this run.
        title: stands beside the progress bar.
    """
    from tqdm import tqdm

    asks = plan.open_asks()
    unfinished = {method for ask in asks for method in ask.methods}
    tasks = {task.method: task for task in plan.tasks if task.method in unfinished}
    for task in tasks.values():
        task.begin(found, made_by)
    left_out = []
    for ask, outcome in tqdm(answerer.answers(asks), total=len(asks), desc=title, unit="question"):
        for method in ask.methods:
            if isinstance(outcome, LeftOut):
                tasks[method].leave_out(outcome.question_id, outcome.reason)
            else:
                tasks[method].append(ask.question.question_id, outcome[method], ask.question.labels)
        if isinstance(outcome, LeftOut):
            left_out.append(outcome)
            tqdm.write(f"question {outcome.question_id} is left out: {outcome.reason}", file=sys.stderr)
    return left_out


def _report_left_out(benchmark: Benchmark, left_out: Sequence[LeftOut]) -> int:
    """Print which questions have no answer, and why; returns an exit code."""
    names: dict[str, list[str]] = defaultdict(list)
    for one in left_out:
        names[one.kind].append(str(one.question_id))
    if "too long" in names:
        print(f"left out, because their prompt does not fit the target's positions: {', '.join(names['too long'])}")
    if "refused" in names:
        print(f"left out, because the target's processor refuses their prompt: {', '.join(names['refused'])}")
    if "unreadable" in names:
        print(f"left out, because their image cannot be read: {', '.join(names['unreadable'])}")
        print(f"the files of {benchmark.name} can be had from {benchmark.source}")
    for kind, reason in (("failed", "something failed, see above"), ("died", "the actors that tried died")):
        if kind in names:
            print(f"error: not answered, because {reason}: {', '.join(names[kind])}", file=sys.stderr)
    return WITH_FAILURES if {"failed", "died"} & names.keys() else DONE


def _check_lossless(plans: Sequence[Plan], models: Models, asked: bool | None) -> bool:
    """Compare the methods with the baseline, see `wants_check`; False where one differs in float32."""
    float32 = InFloat32(models)

    def rerun(plan: Plan, method: str, question_id: QuestionId) -> list[list[int]]:
        return float32.ids_of(plan.ask_again(question_id, method))

    same = True
    for plan in plans:
        drafted = [task for task in plan.tasks if task.method != "baseline"]
        for task in drafted if wants_check(asked, plan.generation.temperature) else ():
            if len(plan.tasks) > 1:
                print(f"{plan.benchmark.name} by {task.method}:")
            same &= check_lossless(task, required=bool(asked), rerun=partial(rerun, plan, task.method))
    return same
