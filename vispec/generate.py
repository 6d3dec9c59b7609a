"""Ask about your own picture: `python -m vispec.generate --image x.jpg "What is this?"`.

The answer is streamed; where the output is a terminal, what the draft head had right is green. Without further flags
the embedded default answers; `--base-model-path` and `--spec-model-path` take any target with its draft head.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vispec import embedded
from vispec.cli import Parser, UserError, count, run_cli
from vispec.evaluation.loading import (
    AUTO,
    TUNE,
    Models,
    Tree,
    as_spec_model_takes,
    dtype_name,
    load_model,
    quiet_transformers,
)
from vispec.evaluation.measure import is_greedy
from vispec.evaluation.text import TextStream, coloured, wants_colour
from vispec.evaluation.tree_flags import add_tree_flags, asked_tree
from vispec.prompts import UNREADABLE, build_inputs, image_file, load_processor, user_turn
from vispec.video import read_video

if TYPE_CHECKING:
    from PIL import Image

    from vispec.model.spec_model import SpecModel

WARM_UP_TOKENS = 8
"""Before `--compare`, so that neither arm pays for what happens only once."""


@dataclass
class Streamed:
    """A streamed answer and what it took."""

    token_ids: list[int]
    accepted: list[int]
    """Draft tokens that each round with a draft had right, those behind an end token too."""
    plain_steps: int
    """Steps without a draft."""
    seconds: float
    """Spent in the model, prefill included; writing to the screen is not."""

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds

    @property
    def tau(self) -> float | None:
        return sum(self.accepted) / len(self.accepted) if self.accepted else None


def main(argv: list[str] | None = None) -> int:
    args = _make_parser().parse_args(argv)
    base, spec, tree, dtype = _pair(args)
    turn = user_turn(args.question, *map(_read_image, args.image), *map(read_video, args.video))
    # what is wrong is said before minutes of loading
    _check_sampling(args)
    shape = as_spec_model_takes(tree)
    quiet_transformers()
    processor = load_processor(base)
    inputs = build_inputs(processor, [turn])
    model = load_model(base, spec, method=args.method, dtype=dtype, device_map=args.device_map, tree=shape)
    if tree == TUNE:
        model.tune([inputs])
    options = {"temperature": args.temperature, "top_p": args.top_p}
    if args.compare:
        for speculate in (False, True):
            _answer(model, inputs, {**options, "max_new_tokens": WARM_UP_TOKENS}, speculate)
    options["max_new_tokens"] = args.max_new_tokens
    answer = _print_answer(model, processor, inputs, options)
    print(f"{model.draft.method} {_speed(answer)}{_rounds(answer)} ({dtype_name(model)})")
    if args.compare:
        plain = _answer(model, inputs, options, speculate=False)
        print(f"baseline {_speed(plain)}")
        print(f"speedup {answer.tokens_per_second / plain.tokens_per_second:.2f}x, outputs identical: ", end="")
        same = "yes" if answer.token_ids == plain.token_ids else "no"
        print(same if is_greedy(args.temperature) else "not compared, both are sampled")
    return 0


def _make_parser() -> Parser:
    parser = Parser(prog="python -m vispec.generate", description="Answer a question about pictures, streamed.")
    add = parser.add_argument
    add("question", help="what to ask")
    add("--image", action="append", default=[], metavar="FILE", help="a picture; may be given several times")
    add("--video", action="append", default=[], type=Path, metavar="FILE", help="a video: some frames are shown")
    add("--base-model-path", help="the target: a folder or a hub id (default: the embedded one)")
    add("--spec-model-path", help="its draft head: a folder or a hub id")
    add(
        "--method",
        choices=("vispec", "eagle2", "medusa", "lookup"),
        help="read from the weights; lookup drafts from the text",
    )
    add("--compare", action="store_true", help="answer by plain decoding too, and compare")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-p", type=float, default=0.0, help="when sampling; 0 is off")
    add("--max-new-tokens", type=count, default=512, help="most tokens of the answer")
    add_tree_flags(parser, AUTO)
    parser.add_hardware(dtype=None)
    return parser


def _pair(args: argparse.Namespace) -> tuple[str, str | None, Tree | str, str]:
    """Paths of target and draft head (none for lookup), the tree, and the dtype."""
    base, spec = args.base_model_path, args.spec_model_path
    if args.method == "lookup":
        if spec is not None:
            raise UserError(f"--spec-model-path {spec}: --method lookup has no draft head")
    elif (base is None) != (spec is None):
        raise UserError("--base-model-path and --spec-model-path belong together, found only one of them")
    dtype, shape = args.dtype or "auto", Models.tree
    if base is None:
        base, spec = embedded.require_weights()
        spec = None if args.method == "lookup" else spec
        dtype, shape = args.dtype or embedded.DTYPE, tuple(embedded.TREE.values())
    return base, spec, asked_tree(args, shape, AUTO), dtype


def _read_image(path: str) -> "Image.Image":
    try:
        return image_file(Path(path))()
    except FileNotFoundError:
        raise UserError(f"--image {path}: no such file") from None
    except UNREADABLE as error:
        raise UserError(f"--image {path}: cannot be read as a picture ({type(error).__name__}: {error})") from None


def _check_sampling(args: argparse.Namespace) -> None:
    from vispec.model.sampling import Sampling

    Sampling(args.temperature, args.top_p)


def _print_answer(model: "SpecModel", processor, inputs: Mapping, options: dict) -> Streamed:
    """Write the answer to stdout as it comes."""
    colour = wants_colour(sys.stdout)
    text = TextStream(processor.tokenizer)

    def show(pieces: list[tuple[str, bool]]) -> None:
        sys.stdout.write(coloured(pieces, colour))
        sys.stdout.flush()

    answer = _answer(model, inputs, options, True, lambda tokens, drafted: show(text.push(tokens, drafted)))
    show(text.finish())
    print("\n")
    return answer


def _answer(
    model: "SpecModel",
    inputs: Mapping,
    options: dict,
    speculate: bool,
    on_round: Callable[[list[int], list[bool]], None] | None = None,
) -> Streamed:
    """Stream an answer; only the time until each round's tokens are there counts."""
    rounds = model.stream(**inputs, **options, speculate=speculate)
    answer = Streamed([], [], 0, 0.0)
    first = True
    while True:
        start = time.perf_counter()
        step = next(rounds, None)
        answer.seconds += time.perf_counter() - start
        if step is None:
            return answer
        answer.token_ids += step.token_ids
        if step.accepted is not None:
            answer.accepted.append(step.accepted)
        elif not first:
            answer.plain_steps += 1
        first = False
        if on_round is not None:
            on_round(step.token_ids, step.drafted)


def _speed(answer: Streamed) -> str:
    return f"{answer.tokens_per_second:.1f} tokens/s ({len(answer.token_ids)} tokens in {answer.seconds:.2f} s)"


def _rounds(answer: Streamed) -> str:
    """What the draft brought."""
    tau = "" if answer.tau is None else f", τ {answer.tau:.2f} draft tokens accepted a round"
    return tau + (f", {answer.plain_steps} plain steps without a draft" if answer.plain_steps else "")


if __name__ == "__main__":
    run_cli(main)
