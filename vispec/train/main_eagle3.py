"""Training EAGLE-3's head on its own outputs, from samples made with --store eagle3, or --online.

accelerate launch --multi_gpu -m --mixed_precision=bf16 vispec.train.main_eagle3 --basepath TARGET --configpath CONFIG \
    --tmpdir SAMPLES --cpdir CHECKPOINTS
"""

from vispec.cli import count, run_cli


def main(argv: list[str] | None = None) -> int:
    from vispec.train import flags
    from vispec.train.command import train
    from vispec.train.eagle3 import STEPS
    from vispec.train.losses import Objective

    description = "EAGLE-3's head, trained on its own outputs."
    parser = flags.make_parser("vispec.train.main_eagle3", description, lr=5e-5, token_weight=1.0)
    parser.add_argument("--ttt-length", type=count, default=STEPS, help="tokens drafted in a row (%(default)s)")
    parser.set_defaults(noise=0.0, num_epochs=40)
    args = parser.parse_args(argv)
    objective = Objective(feature_weight=0.0, token_weight=args.pw, token_loss="ce", ranking_weight=0.0)
    return train(args, "eagle3", flags.eagle_recipe_of(args, objective, mtp_steps=args.ttt_length - 1))


if __name__ == "__main__":
    run_cli(main)
