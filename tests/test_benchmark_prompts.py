"""The prompt of one question of each benchmark for each of the five targets, against `benchmark_prompts.txt`.

A section of that file begins with a line `=== benchmark: targets` and is the prompt of these targets, in which nothing
is left out; the line break before the next section does not belong to it.
"""

import json
from pathlib import Path

import benchmark_rows
import pytest

from vispec.evaluation.benchmarks import BENCHMARKS
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


@pytest.fixture(scope="module")
def processor():
    return load_processor(str(HERE / "golden" / "llava_next" / "target"))


def prompt(processor, benchmark: str, target: str, folder: Path) -> str:
    benchmark_rows.write_one(benchmark, folder)
    (question,), _ = BENCHMARKS[benchmark].questions(str(folder))
    messages = chat_messages(question.turns)
    return processor.apply_chat_template(
        messages, chat_template=TEMPLATES[target], add_generation_prompt=True, tokenize=False
    )


def test_the_snapshot_has_every_benchmark_and_target():
    assert PROMPTS.keys() == {(benchmark, target) for benchmark in BENCHMARKS for target in TEMPLATES}


@pytest.mark.parametrize("target", TEMPLATES)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_prompts_are_as_pinned(processor, benchmark, target, tmp_path):
    assert prompt(processor, benchmark, target, tmp_path) == PROMPTS[benchmark, target]
