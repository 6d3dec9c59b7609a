"""Training stage 1, an EAGLE-2 head on text.

accelerate launch --multi_gpu -m --mixed_precision=bf16 vispec.train.main --basepath TARGET --configpath CONFIG \
    --tmpdir SAMPLES --cpdir CHECKPOINTS
"""

from vispec.cli import run_cli


def main(argv: list[str] | None = None) -> int:
    from vispec.train import flags
    from vispec.train.command import train
    from vispec.train.losses import Objective

    description = "Stage 1: an EAGLE-2 draft head on text."
    args = flags.make_parser("vispec.train.main", description, lr=3e-5, token_weight=0.1).parse_args(argv)
    return train(args, "eagle2", flags.recipe_of(args, Objective.stage1(args.pw), mtp_steps=0))


if __name__ == "__main__":
    run_cli(main)
