"""The demo's first questions as files beside the embedded weights, for measurements that know nothing of the demo.

python -m vispec.demo.ship_questions

`<i>.png` is the picture of question i, `questions.json` has the texts. `vispec.embedded.questions` reads them.
"""

from pathlib import Path

from vispec import embedded
from vispec.cli import Parser, run_cli
from vispec.demo.runner import questions
from vispec.files import write_atomic, write_json_atomic

SHIPPED = 4


def write(folder: Path) -> None:
    """Write the questions into a folder."""
    asked = questions(SHIPPED)
    for index, one in enumerate(asked):
        write_atomic(folder / f"{index}.png", lambda file, image=one.image: image.save(file, "PNG", optimize=True))
    write_json_atomic(folder / "questions.json", [one.text for one in asked])


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m vispec.demo.ship_questions", description="The demo's first questions as files.")
    parser.add_argument(
        "--out", type=Path, default=embedded.QUESTIONS, metavar="DIR", help="(default: beside the embedded weights)"
    )
    args = parser.parse_args(argv)
    write(args.out)
    print(f"{SHIPPED} questions written to {args.out}")
    return 0


if __name__ == "__main__":
    run_cli(main)
