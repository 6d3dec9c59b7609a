"""Long answers about LLaVA-Pretrain images by a Qwen2.5-VL target.

python -m vispec.ge_data.allocation_qwen_pretrain_gen --outdir OUT --model TARGET
"""

from vispec.cli import run_cli
from vispec.ge_data.command import run


def main(argv: list[str] | None = None) -> int:
    return run("image", "qwen", argv)


if __name__ == "__main__":
    run_cli(main)
