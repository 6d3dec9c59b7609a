"""Training stage 2, the ViSpec head on images with multi-token prediction; or EAGLE-2's head or SpecVLM's on images.

accelerate launch --multi_gpu -m --mixed_precision=bf16 vispec.train.main_mtp --basepath TARGET --configpath CONFIG \
    --loadpath STAGE1/state_20 --tmpdir SAMPLES --cpdir CHECKPOINTS --mtp-steps=1 --num-q=2 --use-ours=True
"""

import argparse

from vispec.cli import Parser, count, parse_bool, run_cli, whole

METHODS = ("vispec", "eagle2", "specvlm")


def main(argv: list[str] | None = None) -> int:
    from vispec.train import flags, specvlm
    from vispec.train.command import train
    from vispec.train.losses import Objective

    parser = _parser()
    args = parser.parse_args(argv)
    method = _method(args)
    if args.image_fc is not None:
        print("--image-fc has no effect")
    if method == "specvlm":
        published = {"lr": specvlm.LR, "pw": 0.1, "num_epochs": specvlm.EPOCHS}
        parser.set_defaults(**published, mtp_steps=0, loss=None)
        args = parser.parse_args(argv)
        _refuse("--method specvlm", mtp_steps=args.mtp_steps, loss=args.loss, num_q=args.num_q, blind=args.blind)
        return train(args, method, flags.eagle_recipe_of(args, Objective.eagle(args.pw), mtp_steps=0))
    _refuse(f"--method {method}", compressor=args.compressor)
    if args.blind and method != "vispec":
        raise ValueError("--blind=True needs --use-ours=True: EAGLE-2 reads image rows as ordinary pairs")
    recipe = flags.recipe_of(args, Objective.stage2(args.loss, args.pw), args.mtp_steps)
    return train(args, method, recipe, args.num_q if method == "vispec" else None)


def _parser() -> Parser:
    from vispec.model.drafts.specvlm import BRANCHES
    from vispec.train import flags

    description = "Stage 2: a ViSpec draft head on images, trained on its own outputs."
    parser = flags.make_parser("vispec.train.main_mtp", description, lr=3e-6, token_weight=1.0)
    parser.add_argument("--method", choices=METHODS, help="whose head is trained (vispec)")
    parser.add_argument("--use-ours", type=parse_bool, help="True: another word for --method vispec; False: EAGLE-2")
    parser.add_argument("--num-q", type=count, help="queries of the vision adaptor; default: 2, or those of --loadpath")
    parser.add_argument("--mtp-steps", type=whole, default=1, help="how often outputs are fed back (%(default)s)")
    parser.add_argument("--loss", choices=("l1", "ce"), default="l1", help="as released, or as in the paper")
    parser.add_bool("--blind", "never show the head an image")
    parser.add_argument("--compressor", choices=BRANCHES, help="of SpecVLM: its mode (that of the config, or select)")
    parser.add_argument("--image-fc", nargs="?", const="True", help="accepted, without effect")
    return parser


def _method(args: argparse.Namespace) -> str:
    """--use-ours says whether the head is ViSpec's; --method may say more, and nothing else."""
    if args.method is None:
        return "eagle2" if args.use_ours is False else "vispec"
    if args.use_ours not in (None, args.method == "vispec"):
        raise ValueError(f"--method {args.method} and --use-ours={args.use_ours}: found both, expected one of them")
    return args.method


def _refuse(method: str, **others) -> None:
    """Flags of another method than this one."""
    if found := [f"--{name.replace('_', '-')} {value}" for name, value in others.items() if value]:
        raise ValueError(f"{method} does not take {', '.join(found)}")


if __name__ == "__main__":
    run_cli(main)
