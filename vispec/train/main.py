"""Training stage 1, an EAGLE-2 head on text.

accelerate launch --multi_gpu -m --mixed_precision=bf16 vispec.train.main --basepath TARGET --configpath CONFIG \
    --tmpdir SAMPLES --cpdir CHECKPOINTS
"""

import logging

from vispec.cli import run_cli


def main(argv: list[str] | None = None) -> int:
    from vispec.cli import Parser
    from vispec.train import command
    from vispec.train.losses import Objective

    logging.basicConfig(format="%(message)s")
    parser = Parser(prog="vispec.train.main", description="Stage 1: an EAGLE-2 draft head on text.")
    command.add_arguments(parser, lr=3e-5, token_weight=0.1)
    args = parser.parse_args(argv)
    return command.train(args, "eagle2", command.recipe_of(args, Objective.stage1(args.pw), mtp_steps=0))


if __name__ == "__main__":
    run_cli(main)
