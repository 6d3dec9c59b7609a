"""Ask about your own picture: `python -m vispec.generate --image x.jpg "What is this?"`.

The answer is streamed; where the output is a terminal, what the draft head had right is green. Without further flags
the embedded default answers; `--base-model-path` and `--spec-model-path` take any target with its draft head. With
`--chat` further questions are read from the terminal, or from lines of stdin, until an empty one.
"""

import argparse
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from vispec import web
from vispec.cli import Parser, UserError, count, one_line, run_cli, whole
from vispec.evaluation.comparison import tau, wall_speed
from vispec.evaluation.flags import add_tree_flags, asked_place
from vispec.evaluation.loading import (
    dtype_name,
    keep_prompts,
    load_model,
    quiet_transformers,
)
from vispec.evaluation.measure import (
    Answer,
    Arm,
    Generation,
    Kind,
    answer_question,
    is_greedy,
    stream_question,
    warm_up,
)
from vispec.evaluation.pair_flags import add_pair_flags, asked_pair
from vispec.model.shape import AUTO, TUNE
from vispec.pictures import UnreadableImage, read_picture
from vispec.prompts import SYSTEM_TURN, Turn, build_inputs, load_processor, user_turn
from vispec.text import TextStream, answer_text, coloured, wants_colour
from vispec.video import read_video

if TYPE_CHECKING:
    from PIL import Image

    from vispec.model.spec_model import SpecModel


def main(argv: list[str] | None = None) -> int:
    args = _make_parser().parse_args(argv)
    base, spec, tree, dtype = asked_pair(args)
    place = {f"spec_{name}": value for name, value in asked_place(args).items()}
    turns = [user_turn(args.question, *map(_read_image, args.image), *map(read_video, args.video))]
    # what is wrong is said before minutes of loading
    _check_flags(args)
    quiet_transformers()
    processor = load_processor(base)
    inputs = build_inputs(processor, turns, args.system)
    options = {"method": args.method, "dtype": dtype, "device_map": args.device_map, "skip_visual": args.skip_visual}
    options["draft_image_rows"] = args.draft_image_rows
    model = load_model(base, spec, tree=None if tree == TUNE else tree, **options, **place)
    if tree == TUNE:
        print(model.tune([inputs]).report())
    keep_prompts(model, args.prefix_cache)
    generation = Generation(args.temperature, args.max_new_tokens, args.top_p, args.generation_config)
    while True:
        for kind in ("spec", *_baselines(generation)) if args.compare else ():
            warm_up(Arm(kind, model, kind), [inputs], generation)
        answer = _print_answer(model, processor, inputs, generation, args.seed)
        print(f"{model.draft.method} {_speed(answer)}{_rounds(answer)} ({dtype_name(model)})")
        if args.compare:
            _compare(model, inputs, generation, args.seed, answer)
        question = _next_question() if args.chat else None
        if question is None:
            return 0
        turns += [Turn("assistant", (answer_text(processor.tokenizer, answer.output_ids),)), user_turn(question)]
        inputs = build_inputs(processor, turns, args.system)
        _check_length(model, inputs)


def _make_parser() -> Parser:
    parser = Parser(prog="python -m vispec.generate", description="Answer a question about pictures, streamed.")
    add = parser.add_argument
    add("question", help="what to ask")
    add("--image", action="append", default=[], metavar="FILE|URL", help="a picture; may be given several times")
    add("--video", action="append", default=[], type=Path, metavar="FILE", help="a video: some frames are shown")
    add("--system", default=SYSTEM_TURN, metavar="TEXT", help="the system turn; '' for none (default: the paper's)")
    add("--chat", action="store_true", help="read further questions from stdin, until an empty line")
    kept = "with --chat: keep prompts of so many tokens, from which the next one is read on (default: none)"
    add("--prefix-cache", type=whole, default=0, metavar="TOKENS", help=kept)
    add_pair_flags(parser)
    add("--compare", action="store_true", help="answer by our plain loop and by transformers' generate() too")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-p", type=float, default=0.0, help="when sampling; 0 is off")
    add("--seed", type=whole, help="when sampling: the same seed draws the same text, with and without a draft")
    add("--max-new-tokens", type=count, default=512, help="most tokens of the answer")
    parser.add_bool(
        "--generation-config", "apply what else the target's generation config says, such as penalties and top_k"
    )
    add_tree_flags(parser, AUTO)
    parser.add_hardware(dtype=None)
    return parser


def _read_image(place: str) -> "Image.Image":
    """A picture of a file or of a URL."""
    try:
        return read_picture(BytesIO(_fetch(place)) if web.is_url(place) else Path(place))
    except UnreadableImage as error:
        raise UserError(f"--image {place}: cannot be read as a picture ({error})") from None


def _fetch(url: str) -> bytes:
    try:
        return web.fetch(url)
    except OSError as error:
        raise UserError(f"--image {url}: cannot be fetched ({one_line(error)})") from None


def _check_flags(args: argparse.Namespace) -> None:
    from vispec.model.sampling import Sampling

    Sampling(args.temperature, args.top_p)
    if args.prefix_cache and not args.chat:
        raise UserError("--prefix-cache is for the further questions of --chat")
    if args.prefix_cache and args.compare:
        raise UserError("--prefix-cache: with --compare every answer reads its prompt itself")


def _next_question() -> str | None:
    """The next line of stdin; None where that is empty or there is none."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip() or None
    except EOFError:
        return None


def _check_length(model: "SpecModel", inputs: Mapping) -> None:
    length, positions = inputs["input_ids"].shape[1], model.target.max_positions
    if length > positions:
        raise UserError(f"the conversation has become too long: {length} tokens, the target has {positions} positions")


def _print_answer(model: "SpecModel", processor, inputs: Mapping, generation: Generation, seed: int | None) -> Answer:
    """Write the answer to stdout as it comes."""
    colour = wants_colour(sys.stdout)
    text = TextStream(processor.tokenizer)

    def show(pieces: list[tuple[str, bool]]) -> None:
        sys.stdout.write(coloured(pieces, colour))
        sys.stdout.flush()

    answer = stream_question(model, inputs, generation, seed, lambda tokens, drafted: show(text.push(tokens, drafted)))
    show(text.finish())
    print("\n")
    return answer


def _baselines(generation: Generation) -> dict[Kind, str]:
    """What an answer is compared with, and how that is called: transformers' generate() where decoding is greedy."""
    greedy = is_greedy(generation.temperature)
    return {"baseline": "our own plain loop"} | ({"generate": "transformers' own generate()"} if greedy else {})


def _compare(model: "SpecModel", inputs: Mapping, generation: Generation, seed: int | None, answer: Answer) -> None:
    """Answer once more without a draft; print how much faster `answer` came, and whether it is the same."""
    comparable = is_greedy(generation.temperature) or seed is not None
    for kind, name in _baselines(generation).items():
        plain = answer_question(model, inputs, kind, generation, seed)
        print(f"{kind} {_speed(plain)}: {name}")
        same = "yes" if answer.output_ids == plain.output_ids else "no"
        print(
            f"speedup {wall_speed([answer]) / wall_speed([plain]):.2f}x over {name}, outputs identical: "
            + (same if comparable else "not compared, both are sampled without --seed")
        )


def _speed(answer: Answer) -> str:
    return f"{wall_speed([answer]):.1f} tokens/s ({len(answer.output_ids)} tokens in {answer.wall_time:.2f} s)"


def _rounds(answer: Answer) -> str:
    """What the draft brought."""
    mean = tau([answer])
    told = "" if mean is None else f", τ {mean:.2f} draft tokens accepted a round"
    return told + (f", {answer.plain_steps} plain steps without a draft" if answer.plain_steps else "")


if __name__ == "__main__":
    run_cli(main)
