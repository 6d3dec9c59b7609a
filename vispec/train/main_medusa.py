"""Training Medusa's heads on the data of stage 1.

accelerate launch --multi_gpu -m --mixed_precision=bf16 vispec.train.main_medusa --basepath TARGET --configpath CONFIG \
    --tmpdir SAMPLES --cpdir CHECKPOINTS
"""

from vispec.cli import run_cli


def main(argv: list[str] | None = None) -> int:
    from vispec.model.drafts.medusa import HEADS
    from vispec.train import flags
    from vispec.train.command import train
    from vispec.train.losses import Objective

    description = f"Medusa's {HEADS} heads, on the data of stage 1."
    args = flags.make_parser("vispec.train.main_medusa", description, lr=3e-5, token_weight=0.1).parse_args(argv)
    return train(args, "medusa", flags.recipe_of(args, Objective.eagle(args.pw), mtp_steps=HEADS - 1))


if __name__ == "__main__":
    run_cli(main)
