"""The benchmarks: what is asked, about which images, and where they come from."""

from vispec.evaluation.benchmarks.base import Benchmark, Question, first_shuffled
from vispec.evaluation.benchmarks.coco import COCO_CAPTION
from vispec.evaluation.benchmarks.mmspec import MMSPEC
from vispec.evaluation.benchmarks.mmvet import MMVET
from vispec.evaluation.benchmarks.row_files import GQA, MME, SEED_BENCH, TEXTVQA, VIZWIZ
from vispec.evaluation.benchmarks.scienceqa import SQA

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (SQA, MMVET, TEXTVQA, MME, COCO_CAPTION, VIZWIZ, GQA, SEED_BENCH, MMSPEC)
}
"""In the order of the paper's tables, and what it does not have."""

__all__ = ["BENCHMARKS", "Benchmark", "Question", "first_shuffled"]
