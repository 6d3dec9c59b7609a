"""Long runs that look for what no test has thought of: random decoding, and work that is killed at random moments.

    python -m tests.fuzz.soak --minutes 10 --seed 0

Decoding is compared token for token: greedy answers with those of transformers' generate(), sampled ones with plain
decoding by the same seed. What kill -9 has interrupted and the same command has gone on with is compared file for file
with a run that nothing has disturbed. Ends with exit code 1 after any difference; each is told with its seed, and
`--only decoding --seed S --rounds 1` repeats that round. What is refused (a ValueError) is counted and told once.
"""

import argparse
import logging
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from tests.fuzz.kills import RUNS, Workshop
from vispec import SpecModel
from vispec.evaluation.families.family import BREAK, PADDING, TEXT_FROM, Family, Inputs, tiny_model
from vispec.evaluation.families.oracle import Oracle
from vispec.evaluation.families.prompts import batch_of, prompt_of
from vispec.evaluation.families.registry import FAMILIES
from vispec.evaluation.families.trial import random_head
from vispec.model.drafts import Draft, PromptLookup
from vispec.model.shape import AUTO, TreeShape

CHAIN = "2/0/1"
"""A tree that every target can follow."""
DRAFTS = ("lookup", "vispec", "eagle2", "medusa", "oracle")


@dataclass
class Found:
    """What all rounds have come to."""

    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    refused: Counter = field(default_factory=Counter)
    """Reasons by how often they were given."""

    def fail(self, round_name: str, what: str) -> None:
        self.failures.append(f"{round_name}: {what}")
        print(f"FAILED {self.failures[-1]}", flush=True)

    def compare(self, found: list[list[int]], expected: list[list[int]], round_name: str, what: str) -> bool:
        """Rows of tokens, which must be the same."""
        self.counts["comparisons"] += len(expected)
        if found != expected:
            self.counts["mismatches"] += 1
            self.fail(round_name, f"{what}: {found}, expected {expected}")
        return found == expected

    def report(self) -> str:
        told = ("rounds", "prompts", "comparisons", "mismatches", "accepted tokens", "not compared", "refused")
        told += ("runs killed", "kills", "files compared", "files different")
        lines = [", ".join(f"{self.counts[name]:,} {name}" for name in told)]
        lines += [f"refused {count} times: {reason}" for reason, count in self.refused.most_common()]
        return "\n".join([*lines, f"{len(self.failures)} failures"])


# --- decoding ---


@dataclass
class Case:
    """One target with some prompts, and how they are answered."""

    family: Family
    model: PreTrainedModel
    prompts: list[Inputs]
    options: dict
    """Of generate()."""
    sampled: bool
    trees: list[str]
    fast: bool

    @property
    def batch(self) -> Inputs:
        return self.prompts[0] if len(self.prompts) == 1 else batch_of(self.prompts, self.family.join)

    def new_tokens(self, output: torch.Tensor) -> list[list[int]]:
        return output[:, -(output.shape[1] - self.batch["input_ids"].shape[1]) :].tolist()


def random_case(dice: random.Random) -> tuple[str, Case] | None:
    """None where the installed transformers lacks the family."""
    name = dice.choice(list(FAMILIES))
    family = FAMILIES[name]
    model = tiny_model(family, seed=dice.randrange(10_000))
    if model is None:
        return None
    rows = dice.choice((1, 1, 2, 3, 4))
    prompts = [prompt_of(family, model, random_layout(dice, family), dice.randrange(10_000)) for _ in range(rows)]
    words = range(TEXT_FROM, BREAK)
    model.generation_config.eos_token_id = dice.choice((None, None, dice.sample(words, 2)))
    trees = [f"{dice.randint(2, 40)}/{dice.randint(0, 6)}/{dice.randint(1, 9)}", dice.choice(("auto", "12/3/4"))]
    sampled = dice.random() < 0.35
    options = random_options(dice, sampled)
    if options and rows > 1:  # processors see the padding of a batch, as generate()'s do
        options["suppress_tokens"] = [PADDING, *options.get("suppress_tokens", [])]
    options["max_new_tokens"] = dice.randint(1, 32)
    return name, Case(family, model, prompts, options, sampled, trees, dice.random() < 0.8)


def random_layout(dice: random.Random, family: Family) -> str:
    """Text of random lengths around up to three images, of which some may touch."""
    images = dice.randint(0, 3) if family.images else 0
    pieces = [dice.choice("ab") for _ in range(images)] + ["." * dice.randint(1, 4) for _ in range(dice.randint(1, 3))]
    dice.shuffle(pieces)
    return "".join(pieces)


def random_options(dice: random.Random, sampled: bool) -> dict:
    """Some options of generate(), often none."""
    words = range(TEXT_FROM, BREAK)
    processors = {
        "repetition_penalty": round(dice.uniform(1.0, 1.6), 2),
        "no_repeat_ngram_size": dice.randint(1, 4),
        "min_new_tokens": dice.randint(1, 12),
        "suppress_tokens": dice.sample(words, dice.randint(1, 8)),
        "begin_suppress_tokens": dice.sample(words, 3),
        "bad_words_ids": [dice.sample(words, dice.randint(1, 2)) for _ in range(3)],
        "sequence_bias": {tuple(dice.sample(words, dice.randint(1, 2))): round(dice.uniform(-4, 4), 1)},
    }
    warpers = {
        "temperature": round(dice.uniform(0.4, 2.0), 2),
        "top_k": dice.randint(1, 40),
        "top_p": round(dice.uniform(0.3, 1.0), 2),
        "min_p": round(dice.uniform(0.0, 0.3), 2),
        "typical_p": round(dice.uniform(0.3, 0.99), 2),
        "epsilon_cutoff": round(dice.uniform(0.001, 0.1), 3),
    }
    options = {name: processors[name] for name in dice.sample(list(processors), dice.choice((0, 0, 1, 2)))}
    if sampled:
        options |= {name: warpers[name] for name in dice.sample(list(warpers), dice.randint(0, 3))}
    return options


def decoding_round(seed: int, found: Found) -> None:
    dice = random.Random(seed)
    while (made := random_case(dice)) is None:
        pass
    name, case = made
    where = f"decoding, seed {seed} ({name}, {len(case.prompts)} rows, {case.options}, trees {', '.join(case.trees)})"
    try:
        plain = SpecModel(case.model, PromptLookup(), tree=CHAIN, fast=case.fast)
    except ValueError as error:
        found.counts["refused"] += 1
        found.refused[str(error)] += 1
        return
    found.counts["prompts"] += len(case.prompts)
    options, seeds = case.options | {"do_sample": case.sampled}, {}
    if case.sampled:
        seeds = {"seed": [dice.randrange(2**31) for _ in case.prompts]}
        rows = [
            plain.generate(**prompt, **options, seed=[seed], speculate=False)
            for prompt, seed in zip(case.prompts, seeds["seed"], strict=True)
        ]
    else:
        options = {"repetition_penalty": 1.0} | options
        try:
            rows = [case.model.generate(**prompt, **options) for prompt in case.prompts]
        except Exception:  # of a family whose own generate() cannot have it
            found.counts["not compared"] += 1
            return
    texts = [row[0] for row in rows]
    answers = [row[0, prompt["input_ids"].shape[1] :].tolist() for row, prompt in zip(rows, case.prompts, strict=True)]
    expected = padded(answers)
    output = plain.generate(**case.batch, **options, **seeds, speculate=False)
    if case.new_tokens(output) != expected and not case.sampled:
        # the windowed cache of older versions is wrong behind a prompt shorter than the window
        uncached = [case.model.generate(**prompt, **options, use_cache=False)[0] for prompt in case.prompts]
        lengths = [prompt["input_ids"].shape[1] for prompt in case.prompts]
        if case.new_tokens(output) == padded([row[n:].tolist() for row, n in zip(uncached, lengths, strict=True)]):
            found.counts["not compared"] += 1
            return
    if not found.compare(case.new_tokens(output), expected, where, "plain"):
        return  # the draft that knows the answers knows others
    for draft, model in models(dice, case, plain, texts):
        answer = model.generate(**case.batch, **options, **seeds, return_dict_in_generate=True)
        found.counts["accepted tokens"] += sum(map(sum, answer.acceptance_lengths))
        found.compare(case.new_tokens(answer.sequences), expected, where, draft)
        if case.options.keys() == {"max_new_tokens"} and not case.sampled:
            compare_other_ways(case, model, expected, found, f"{where}, {draft}")


def compare_other_ways(case: Case, model: SpecModel, expected: list[list[int]], found: Found, where: str) -> None:
    """What says the same as a greedy generate()."""
    limit = case.options["max_new_tokens"]
    for name in ("specgenerate", "baseline_generate"):
        output = getattr(model, name)(**case.batch, max_new_tokens=limit)
        found.compare(case.new_tokens(output), expected, where, name)
    if len(case.prompts) == 1:
        steps = model.stream(**case.batch, max_new_tokens=limit)
        found.compare([[token for step in steps for token in step.token_ids]], expected, where, "stream")


def models(
    dice: random.Random, case: Case, plain: SpecModel, texts: list[torch.Tensor]
) -> Iterator[tuple[str, SpecModel]]:
    """The target with the draft that knows the answers, and with another one, each with a tree of its own."""
    for draft, asked in zip(("oracle", dice.choice(DRAFTS)), case.trees, strict=True):
        tree = asked if asked == AUTO else plain.target.fit(TreeShape.parse(asked))
        yield f"{draft} {tree}", plain.with_tree(tree, draft_of(draft, case.model, texts))


def draft_of(name: str, model: PreTrainedModel, texts: list[torch.Tensor]) -> Draft:
    if name == "lookup":
        return PromptLookup()
    if name == "oracle":
        return Oracle(texts, model.get_input_embeddings().weight.shape[0])
    return random_head(model, name)


def padded(rows: list[list[int]]) -> list[list[int]]:
    longest = max(map(len, rows))
    return [row + [PADDING] * (longest - len(row)) for row in rows]


# --- all rounds ---


def soak(kinds: tuple[str, ...], seed: int, minutes: float, rounds: int | None, folder: Path) -> Found:
    """Rounds of the seeds from `seed` on until the time or the rounds are over; killed work takes half of the time."""
    found, workshop = Found(), Workshop(folder)
    spent = dict.fromkeys(kinds, 0.0)
    end = time.monotonic() + 60 * minutes
    number = 0
    while time.monotonic() < end and (rounds is None or number < rounds):
        kind = min(spent, key=spent.get)
        started = time.monotonic()
        try:
            if kind == "decoding":
                decoding_round(seed + number, found)
            else:
                kill_round(seed + number, workshop, found)
        except Exception:
            found.fail(f"{kind}, seed {seed + number}", traceback.format_exc())
        found.counts["rounds"] += 1
        spent[kind] += time.monotonic() - started
        number += 1
    return found


def kill_round(seed: int, workshop: Workshop, found: Found) -> None:
    dice = random.Random(seed)
    run = dice.choice(RUNS)
    kills, differences, files = workshop.disturb(run, dice)
    found.counts.update({"runs killed": 1, "kills": len(kills), "files compared": files})
    found.counts["files different"] += len(differences)
    for difference in differences:
        found.fail(f"kills, seed {seed} ({run.name}, {'; '.join(kills)})", difference)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, help="most rounds (default: as many as there is time for)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the others count up (%(default)s)")
    parser.add_argument("--only", choices=("decoding", "kills"), help="leave out the other kind")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="transformers")  # of lengths that cannot be met
    transformers.logging.set_verbosity_error()
    logging.getLogger("vispec").setLevel(logging.ERROR)  # which pass decodes, for every model anew
    with tempfile.TemporaryDirectory(prefix="vispec-soak-") as folder:
        os.environ |= {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": f"{folder}/cache"}
        kinds = (args.only,) if args.only else ("decoding", "kills")
        found = soak(kinds, args.seed, args.minutes, args.rounds, Path(folder))
    print(found.report())
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
