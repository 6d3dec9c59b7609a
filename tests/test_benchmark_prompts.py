"""The prompt of one question of each benchmark for each of the five targets, against `benchmark_prompts.txt`.

A section of that file begins with a line `=== benchmark: targets` and is the prompt of these targets, in which nothing
is left out; the line break before the next section does not belong to it.
"""

import json
from pathlib import Path

import benchmark_rows
import pytest

from vispec.evaluation.benchmarks import BENCHMARKS, Question
from vispec.prompts import chat_messages, load_processor

HERE = Path(__file__).parent
TEMPLATES = json.loads((HERE / "golden" / "published_chat_templates.json").read_text())


def snapshot() -> dict[tuple[str, str], str]:
    """Prompts by benchmark and target."""
    prompts = {}
    for section in (HERE / "benchmark_prompts.txt").read_text().removeprefix("=== ").split("\n=== "):
        head, prompt = section.split("\n", 1)
        benchmark, targets = head.split(": ")
        prompts |= {(benchmark, target): prompt for target in targets.split(", ")}
    return prompts


PROMPTS = snapshot()
WITH_EXAMPLE = "sqa with a worked example"


@pytest.fixture(scope="module")
def processor():
    return load_processor(str(HERE / "golden" / "llava_next" / "target"))


def prompt(processor, question: Question, target: str) -> str:
    messages = chat_messages(question.turns)
    return processor.apply_chat_template(
        messages, chat_template=TEMPLATES[target], add_generation_prompt=True, tokenize=False
    )


def test_the_snapshot_has_every_benchmark_and_target():
    names = [*BENCHMARKS, WITH_EXAMPLE]
    assert PROMPTS.keys() == {(name, target) for name in names for target in TEMPLATES}


@pytest.mark.parametrize("target", TEMPLATES)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_prompts_are_as_pinned(processor, benchmark, target, tmp_path):
    benchmark_rows.write_one(benchmark, tmp_path)
    (question,), _ = BENCHMARKS[benchmark].questions(str(tmp_path))
    assert prompt(processor, question, target) == PROMPTS[benchmark, target]


@pytest.mark.parametrize("target", TEMPLATES)
def test_prompts_with_a_worked_example_are_as_pinned(processor, target, tmp_path):
    bird = {"question": "Which animal is a bird?", "choices": ["a gull", "a cow"], "answer": 0, "hint": ""}
    bird |= {"lecture": "Birds lay eggs.", "solution": "A gull has wings."}
    problems = {"3": benchmark_rows.problem(**bird), "7": benchmark_rows.problem()}
    benchmark_rows.write_scienceqa(tmp_path, problems, {"train": ["3"], "test": ["7"]})
    (tmp_path / "images").mkdir()
    (question,), _ = BENCHMARKS["sqa"].questions(str(tmp_path), shot_number=1)
    assert prompt(processor, question, target) == PROMPTS[WITH_EXAMPLE, target]
