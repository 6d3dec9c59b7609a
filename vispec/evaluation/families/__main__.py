"""The table of families in docs/models.md.

    python -m vispec.evaluation.families --out docs/models.md

Tries every family on tiny random models, and writes the section of the installed version of transformers; those of
other versions stay. A token that differs from the model's own, or an error that is no line, ends the command with exit
code 1. Nothing is downloaded.
"""

import logging
import sys
from pathlib import Path

from vispec.cli import Parser, UserError, run_cli


def main(argv: list[str] | None = None) -> int:
    prog = "python -m vispec.evaluation.families"
    parser = Parser(prog=prog, description="What decoding does with families of VLMs.")
    parser.add_argument("--out", metavar="FILE", help="write the section of this version of transformers there")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="try these alone; without --out")
    args = parser.parse_args(argv)

    import transformers

    from vispec.evaluation.families import table
    from vispec.evaluation.families.registry import FAMILIES
    from vispec.evaluation.families.trial import DIFFERS, FAILED, try_family
    from vispec.files import write_atomic

    unknown = [name for name in args.only or () if name not in FAMILIES]
    if unknown:
        raise UserError(f"--only {unknown[0]}: unknown, expected one of {', '.join(FAMILIES)}")
    if args.only and args.out:
        raise UserError("--only: expected no --out beside it, a section says everything of its version")
    transformers.logging.set_verbosity_error()
    logging.getLogger("vispec").setLevel(logging.ERROR)  # which pass decodes, for every model anew
    rows = {}
    for name in args.only or FAMILIES:
        outcomes = try_family(FAMILIES[name])
        if outcomes is None:
            continue
        rows[name] = outcomes
        print(table.table_row(name, outcomes), flush=True)
        for outcome in dict.fromkeys(outcomes.values()):
            if outcome.reason:
                print(f"    {outcome.verdict}: {outcome.reason}", flush=True)
    if args.out:
        file = Path(args.out)
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        text = table.with_section(before, table.section(rows))
        write_atomic(file, lambda part: part.write(text.encode()))
    wrong = {DIFFERS: "other tokens than generate()", FAILED: "an error that is no line"}
    found = {kind: [name for name, row in rows.items() if kind in {o.verdict for o in row.values()}] for kind in wrong}
    for kind, names in found.items():
        if names:
            print(f"{wrong[kind]}: {', '.join(names)}", file=sys.stderr)
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    run_cli(main)
