"""Answer mmspec by tree speculative decoding."""

from vispec.cli import run_cli
from vispec.evaluation.run_one import run_benchmark


def main(argv: list[str] | None = None) -> int:
    return run_benchmark("mmspec", "spec", argv)


if __name__ == "__main__":
    run_cli(main)
