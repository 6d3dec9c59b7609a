"""Are the outputs right on this device? Answers of tiny random models, many shapes of steps, in both arms.

    python scripts/gpu_exactness.py --device cuda --json exactness.json

In float32 both arms must say what transformers' generate says, with images and without, in a batch, beyond the first
capacity of the caches, with prompt lookup, and with plain steps among rounds; sampled tokens must follow the target's
distribution. In bfloat16 differences are counted. A check that fails is written down, and the others go on.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vispec.cli import run_cli
from vispec.files import write_json_atomic

FAMILIES = ("llava_next", "llava_1.5", "qwen2_5_vl")
SEEDS, NEW_TOKENS = (0, 1, 2), 24
LAYOUTS = (".", ".a.", "a.bb.")
"""Prompts without an image, with one, and with three of which two touch."""
BATCH = (".a.", "a.bb.", "..a.")
"""Rows of a batch: three lengths."""
TREE = (30, 3, 8)
SAMPLED_TOKENS = 500
"""Of each answer whose tokens are counted."""
SETTINGS = ({"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 5})
FIRST_CAPACITY, LONG_ANSWER = 40, 300
"""Tokens that caches have room for at first, and tokens of an answer that outgrows them."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", metavar="FILE", required=True, help="where the counts are written")
    args = parser.parse_args(argv)
    found = {}
    for name, check in CHECKS.items():
        try:
            found[name] = check(args.device)
        except Exception as error:  # whatever it is, the other checks are of use
            found[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(name, found[name], flush=True)
        write_json_atomic(args.json, found)
    return 0


def pair(family: str, seed: int, device: str, dtype=None, vocabulary: int | None = None, lookup: bool = False):
    """A `SpecModel` of a random target and a random ViSpec head, or prompt lookup."""
    from tiny_models import random_head, random_target

    from vispec import SpecModel
    from vispec.model.drafts import PromptLookup

    target = random_target(family, seed, vocabulary).to(device, dtype)
    draft = PromptLookup() if lookup else random_head(target, "vispec", seed + 10).to(device, dtype)
    return SpecModel(target, draft, *TREE)


def placed(inputs: dict, device: str, dtype=None) -> dict:
    return {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in inputs.items()
    }


def counts() -> dict:
    return {"answers": 0, "baseline_differs": 0, "spec_differs": 0, "accepted": 0, "captured": True}


def compare(found: dict, model, inputs: dict, new_tokens: int) -> None:
    """Both arms against transformers' generate, the baseline; and ViSpec against the baseline."""
    from tiny_models import generate

    theirs = generate(model.target.model, inputs, max_new_tokens=new_tokens)
    ours = model.baseline_generate(**inputs, max_new_tokens=new_tokens)
    spec, accepted = model.specgenerate(**inputs, max_new_tokens=new_tokens, return_acceptance_len=True)
    found["answers"] += 1
    found["baseline_differs"] += ours.tolist() != theirs.tolist()
    found["spec_differs"] += spec.tolist() != ours.tolist()
    found["accepted"] += sum(accepted)
    found["captured"] &= model.captured == "all"


def single_prompts(device: str, dtype: str) -> dict:
    import torch
    from tiny_models import image_prompt

    found, kind = counts(), getattr(torch, dtype)
    for family in FAMILIES:
        for seed in SEEDS:
            model = pair(family, seed, device, kind)
            for layout in LAYOUTS:
                inputs = placed(image_prompt(model.target.model, seed, layout), device, kind)
                compare(found, model, inputs, NEW_TOKENS)
    return found


def batch(device: str) -> dict:
    """Rows of a batch against the baseline's answer to each of them alone."""
    from tiny_models import image_prompt

    from vispec.ge_data.batch_generate import collate_prompts

    found = counts()
    for family in FAMILIES:
        model = pair(family, 0, device)
        prompts = [placed(image_prompt(model.target.model, i, layout), device) for i, layout in enumerate(BATCH)]
        alone = [model.baseline_generate(**one, max_new_tokens=NEW_TOKENS)[0, -NEW_TOKENS:] for one in prompts]
        together = collate_prompts(prompts, pad_token_id=0)
        ours = model.baseline_generate(**together, max_new_tokens=NEW_TOKENS)
        spec, accepted = model.specgenerate(**together, max_new_tokens=NEW_TOKENS, return_acceptance_len=True)
        found["answers"] += len(prompts)
        for row, expected in enumerate(alone):
            found["baseline_differs"] += ours[row, -NEW_TOKENS:].tolist() != expected.tolist()
            found["spec_differs"] += spec[row, -NEW_TOKENS:].tolist() != expected.tolist()
        found["accepted"] += sum(map(sum, accepted))
        found["captured"] &= model.captured == "all"
    return found


def sampling(device: str) -> dict:
    """How often a token of each rank came, against the target's probabilities after the text before it: p-values."""
    import torch
    from tiny_models import text_prompt

    found = {"answers": 0, "least_p_value": 1.0, "captured": True}
    model = pair("llava_1.5", 0, device, vocabulary=12)
    inputs = placed(text_prompt(model.target.model, 5, seed=0), device)
    for settings in SETTINGS:
        for arm in ("baseline_generate", "specgenerate"):
            torch.manual_seed(found["answers"])
            ids = getattr(model, arm)(**inputs, **settings, max_new_tokens=SAMPLED_TOKENS)
            with torch.inference_mode():
                logits = model.target.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            start = inputs["input_ids"].shape[1]
            p = rank_p_value(logits[0, start - 1 : -1], ids[0, start:], settings)
            found["answers"] += 1
            found["least_p_value"] = min(found["least_p_value"], p)
    found["captured"] = model.captured == "all"
    return found


def rank_p_value(logits, tokens, settings: dict) -> float:
    """Chi-square of the ranks of tokens (n,) under the warped distributions of logits (n, V)."""
    import torch

    from vispec.model.sampling import Choice, Sampling

    probabilities = Choice(Sampling(**settings).warpers).scores(logits).softmax(-1).double().cpu()
    ranked, order = probabilities.sort(dim=-1, descending=True)
    observed = torch.zeros_like(ranked).scatter_(1, order.argsort(-1).gather(1, tokens.cpu()[:, None]), 1.0)
    if (observed * (ranked == 0)).any():
        return 0.0
    excess = (observed - ranked).sum(0)
    covariance = torch.diag(ranked.sum(0)) - ranked.T @ ranked
    common = ranked.sum(0) >= 5  # the other ranks are one outcome, which the common ones determine
    if ranked.sum(0)[~common].sum() < 5:
        common[common.nonzero()[-1]] = False
    excess, covariance = excess[common], covariance[common][:, common]
    statistic = excess @ torch.linalg.solve(covariance, excess)
    return float(torch.special.gammaincc(common.sum().double() / 2, statistic / 2))


def growth(device: str) -> dict:
    """An answer that moves to larger caches on the way, more than once."""
    from tiny_models import text_prompt

    from vispec.model import decoding

    found, before = counts(), decoding.CAPACITY_AHEAD
    decoding.CAPACITY_AHEAD = FIRST_CAPACITY
    try:
        for family in FAMILIES:
            model = pair(family, 5, device, vocabulary=12)
            compare(found, model, placed(text_prompt(model.target.model, 4, seed=5), device), LONG_ANSWER)
    finally:
        decoding.CAPACITY_AHEAD = before
    return found


def lookup(device: str) -> dict:
    from tiny_models import image_prompt

    found = counts()
    for family in FAMILIES:
        model = pair(family, 1, device, vocabulary=12, lookup=True)
        compare(found, model, placed(image_prompt(model.target.model, 1, ".a."), device), 3 * NEW_TOKENS)
    return found


def auto(device: str) -> dict:
    """Plain steps among rounds with several trees, all captured before the first answer."""
    from tiny_models import image_prompt

    found = counts()
    for family in FAMILIES:
        model = pair(family, 2, device, vocabulary=12).with_tree("auto")
        inputs = placed(image_prompt(model.target.model, 2, ".a."), device)
        model.warmup(inputs["input_ids"].shape[1], 3 * NEW_TOKENS)
        compare(found, model, inputs, 3 * NEW_TOKENS)
    return found


CHECKS = {
    "float32": lambda device: single_prompts(device, "float32"),
    "bfloat16": lambda device: single_prompts(device, "bfloat16"),
    "batch": batch,
    "sampling": sampling,
    "growth": growth,
    "lookup": lookup,
    "auto": auto,
}


if __name__ == "__main__":
    run_cli(main)
