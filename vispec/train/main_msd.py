"""Training MSD's head on text and images, at first on text alone.

accelerate launch --multi_gpu -m --mixed_precision=bf16 vispec.train.main_msd --basepath TARGET --configpath CONFIG \
    --tmpdir TEXT_SAMPLES IMAGE_SAMPLES --cpdir CHECKPOINTS
"""

from vispec.cli import run_cli


def main(argv: list[str] | None = None) -> int:
    from vispec.train import flags
    from vispec.train.command import train
    from vispec.train.losses import Objective
    from vispec.train.msd import EPOCHS

    description = "MSD's head: text first, then more and more images."
    parser = flags.make_parser("vispec.train.main_msd", description, lr=5e-5, token_weight=0.1)
    parser.set_defaults(num_epochs=EPOCHS)
    args = parser.parse_args(argv)
    return train(args, "msd", flags.eagle_recipe_of(args, Objective.eagle(args.pw), mtp_steps=0))


if __name__ == "__main__":
    run_cli(main)
