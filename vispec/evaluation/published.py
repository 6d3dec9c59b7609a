"""The paper's numbers (arXiv 2509.15235), measured by its authors on their GPUs and not by us.

A pair is (speedup, τ); τ counts draft tokens only, as here. Averages are over the eight benchmarks.
"""

from collections.abc import Mapping
from pathlib import Path

from vispec.methods import BASELINE, GENERATE, LOOKUP, MODELS

BENCHMARK_TITLES = {
    "sqa": "SQA",
    "mmvet": "MM-Vet",
    "textvqa": "TextVQA",
    "mme": "MME",
    "coco_caption": "COCO",
    "vizwiz": "VizWiz",
    "gqa": "GQA",
    "seed_bench": "SEED",
}
"""The columns of the paper's tables, in its order."""

METHOD_TITLES = {
    BASELINE: "baseline", GENERATE: "transformers' generate", LOOKUP: "prompt lookup", **dict(reversed(MODELS.items())),
}  # fmt: skip
"""In the order of the rows."""

AVERAGE = "average"

Pair = tuple[float, float]
"""(speedup, τ)."""

# each line: Medusa, EAGLE-2, ViSpec
_AVERAGES: dict[str, dict[float, tuple[Pair, Pair, Pair]]] = {
    "llava-hf/llava-v1.6-vicuna-7b-hf": {
        0.0: ((1.42, 0.72), (1.62, 1.31), (2.58, 2.98)),
        1.0: ((1.36, 0.58), (1.54, 0.98), (2.14, 2.09)),
    },
    "llava-hf/llava-v1.6-vicuna-13b-hf": {
        0.0: ((1.48, 0.82), (1.86, 1.89), (2.38, 2.89)),
        1.0: ((1.40, 0.67), (1.79, 1.47), (2.13, 2.11)),
    },
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        0.0: ((1.14, 0.61), (1.39, 1.16), (1.87, 2.19)),
        1.0: ((1.03, 0.49), (1.21, 0.86), (1.47, 1.42)),
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        0.0: ((1.11, 0.60), (1.40, 1.34), (1.80, 2.24)),
        1.0: ((1.01, 0.52), (1.18, 1.02), (1.49, 1.66)),
    },
}

# ViSpec at temperature 0, speedups and then τ; each line in the order of BENCHMARK_TITLES
_VISPEC: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "llava-hf/llava-v1.6-vicuna-7b-hf": (
        (2.37, 2.52, 2.90, 2.55, 3.22, 2.67, 2.22, 2.22),
        (2.86, 2.83, 2.95, 2.84, 3.30, 3.16, 2.88, 3.03),
    ),
    "llava-hf/llava-v1.6-vicuna-13b-hf": (
        (2.57, 2.34, 2.43, 2.36, 2.82, 2.26, 2.12, 2.16),
        (2.76, 2.73, 2.78, 2.78, 3.18, 2.93, 2.95, 3.04),
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        (1.87, 1.81, 1.85, 1.82, 2.15, 1.71, 2.01, 1.78),
        (1.99, 2.13, 2.15, 1.96, 2.37, 2.22, 2.28, 2.37),
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        (1.84, 1.74, 1.72, 1.96, 1.99, 1.71, 1.91, 1.55),
        (2.19, 2.16, 2.21, 2.15, 2.27, 2.31, 2.30, 2.34),
    ),
}


def published(base_model: str, temperature: float) -> Mapping[str, Mapping[str, Pair]]:
    """The paper's numbers for a target, by method and then by benchmark or `AVERAGE`; empty where it has none.

    Args:
        base_model: a hub id, or a folder whose last component is that of a published hub id.
        temperature: the paper has 0 and 1.
    """
    name = Path(base_model).name
    target = next((hub_id for hub_id in _AVERAGES if name == Path(hub_id).name), None)
    averages = _AVERAGES[target].get(temperature) if target else None
    if averages is None:
        return {}
    found: dict[str, dict[str, Pair]] = {
        method: {AVERAGE: pair} for method, pair in zip(("medusa", "eagle2", "vispec"), averages, strict=True)
    }
    if temperature == 0:
        found["vispec"] |= dict(zip(BENCHMARK_TITLES, zip(*_VISPEC[target], strict=True), strict=True))
    return found
