"""Broken input of every kind, and what the product says to it.

    python -m tests.fuzz.run --cases 5000 --seed 0                     all kinds in turn
    python -m tests.fuzz.run --kind pictures --cases 200               one kind
    python -m tests.fuzz.run --seed 0 --only 1234                      one case again, with its traceback

A case fails that ends in a traceback, that is refused without a line that names what is wrong, that takes what is
surely broken without a word, that refuses what is good, or that does not end.
"""

import argparse
import contextlib
import io
import logging
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # read when the libraries are imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from tests.fuzz.calls import api, flags
from tests.fuzz.files import answers, checkpoints, data, pictures, samples, states, targets
from tests.fuzz.workshop import ACCEPTED, REFUSED, Case, Workshop

KINDS = {kind.__name__: kind for kind in (pictures, checkpoints, targets, data, samples, answers, states, flags, api)}
"""By name; the number of a case chooses among them in turn."""
LONGEST = 30
"""Seconds of a case."""
REFUSALS = (ValueError, OSError)
"""What a command turns into one line; the interface raises TypeError too."""


class Endless(BaseException):
    """A case has taken too long."""


def make_case(shop: Workshop, seed: int, number: int, kind: str | None = None) -> tuple[str, Case]:
    """A case by its number alone; without `kind` the number says that too."""
    kind = kind or list(KINDS)[number % len(KINDS)]
    shop.empty()
    return kind, KINDS[kind](random.Random(f"{seed} {kind} {number}"), shop)


def fault(case: Case) -> str | None:
    """Run a case; what is wrong with how it ended, None for nothing."""
    with told() as output:
        try:
            with limited():
                code = case.run()
            said = output.getvalue()
        except SystemExit as left:
            code, said = left.code, output.getvalue()
        except Endless:
            return f"not done after {LONGEST} s"
        except Exception as error:
            taken = (*REFUSALS, TypeError) if case.api else REFUSALS
            if not isinstance(error, taken):
                return f"{type(error).__name__}: {error}"[:300] + _place(error)
            code, said = 1, f"error: {error}"
            if not any(name in said for name in case.names or ("",)):
                return f"refused without naming {' or '.join(case.names)}: {said[:200]}" + _place(error)
    if isinstance(code, int) and not isinstance(code, bool) and code:
        if "error:" not in said:
            return f"exit code {code} without a line"
        return f"refused what is good: {said[-300:]}" if case.right == ACCEPTED else None
    if case.right == REFUSED and not said.strip():
        return "taken without a word"
    return None


@contextlib.contextmanager
def told() -> Iterator[io.StringIO]:
    """What is written to stderr or logged; stdout is left out, since answers and reports go there."""
    output = io.StringIO()
    handler, logger, stdin = logging.StreamHandler(output), logging.getLogger("vispec"), sys.stdin
    logger.addHandler(handler)
    sys.stdin = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(output):
            yield output
    finally:
        sys.stdin = stdin
        logger.removeHandler(handler)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*_):
        raise Endless

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _place(error: BaseException) -> str:
    """Where our code was when it was raised."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/vispec/" in frame.filename]
    return f" [{Path(ours[-1].filename).name}:{ours[-1].lineno}]" if ours else ""


def run_cases(seed: int, numbers: range, kind: str | None = None, show=print) -> list[str]:
    """The faults of some cases, each with what repeats it."""
    faults, seconds, counts = [], defaultdict(float), Counter()
    with tempfile.TemporaryDirectory() as folder, Workshop(Path(folder)) as shop:
        for number in numbers:
            begun = time.perf_counter()
            name, case = make_case(shop, seed, number, kind)
            found = fault(case)
            seconds[name] += time.perf_counter() - begun
            counts[name] += 1
            if found:
                repeat = f"--seed {seed}{f' --kind {kind}' if kind else ''} --only {number}"
                faults.append(f"{repeat} ({name}: {case.told}): {found}".replace(folder, "…"))
                show(faults[-1])
    for name, count in counts.items():
        show(f"{name:<12}{count:>6} cases, {count / seconds[name]:6.1f} a second")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--only", type=int, metavar="CASE", help="run this one, and let what it raises through")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.reconfigure(errors="replace")
    logging.getLogger("vispec").propagate = False  # what is logged belongs to the case
    if args.only is not None:
        with tempfile.TemporaryDirectory() as folder, Workshop(Path(folder)) as shop:
            name, case = make_case(shop, args.seed, args.only, args.kind)
            print(f"{name}: {case.told}; right: {case.right}", flush=True)
            logging.getLogger("vispec").addHandler(logging.StreamHandler())
            print("gave", repr(case.run())[:300])
        return 0
    faults = run_cases(args.seed, range(args.first, args.first + args.cases), args.kind)
    print(f"{args.cases} cases, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
