"""Training stage 2, the ViSpec head on images with multi-token prediction.

accelerate launch --multi_gpu -m --mixed_precision=bf16 vispec.train.main_mtp --basepath TARGET --configpath CONFIG \
    --loadpath STAGE1/state_20 --tmpdir SAMPLES --cpdir CHECKPOINTS --mtp-steps=1 --num-q=2 --use-ours=True
"""

import logging

from vispec.cli import count, parse_bool, run_cli, whole


def main(argv: list[str] | None = None) -> int:
    from vispec.train import flags
    from vispec.train.command import train
    from vispec.train.losses import Objective

    logging.basicConfig(format="%(message)s")
    description = "Stage 2: a ViSpec draft head on images, trained on its own outputs."
    parser = flags.make_parser("vispec.train.main_mtp", description, lr=3e-6, token_weight=1.0)
    parser.add_argument("--use-ours", type=parse_bool, default=True, help="False: EAGLE-2 instead (%(default)s)")
    parser.add_argument("--num-q", type=count, help="queries of the vision adaptor; default: 2, or those of --loadpath")
    parser.add_argument("--mtp-steps", type=whole, default=1, help="how often outputs are fed back (%(default)s)")
    parser.add_argument("--loss", choices=("l1", "ce"), default="l1", help="as released, or as in the paper")
    parser.add_bool("--blind", "never show the head an image")
    parser.add_argument("--image-fc", nargs="?", const="True", help="accepted, without effect")
    args = parser.parse_args(argv)
    if args.image_fc is not None:
        print("--image-fc has no effect")
    if args.blind and not args.use_ours:
        raise ValueError("--blind=True needs --use-ours=True: EAGLE-2 reads image rows as ordinary pairs")
    recipe = flags.recipe_of(args, Objective.stage2(args.loss, args.pw), args.mtp_steps)
    method = "vispec" if args.use_ours else "eagle2"
    return train(args, method, recipe, args.num_q if args.use_ours else None)


if __name__ == "__main__":
    run_cli(main)
