"""README.md and docs/*.md as tests read them: their commands, their flags, and what they point to."""

import argparse
import importlib
import re
import shlex
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from script_files import script

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = (README, *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
_PROGRAM = re.compile(r"vispec(\.\w+)+|scripts/\w+\.(py|sh)")


class _Built(BaseException):
    """Carries a parser out of the command that has built it; nothing catches it on the way."""


def blocks(document: Path, language: str) -> list[str]:
    """The code blocks of a language."""
    return [code for found, code in _FENCE.findall(document.read_text(encoding="utf-8")) if found == language]


def inline_code(document: Path) -> list[str]:
    """What stands between single backticks, each in one line."""
    text = _FENCE.sub("", document.read_text(encoding="utf-8"))
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def commands(document: Path) -> list[tuple[str, list[str]]]:
    """Program and arguments of each of our commands in bash blocks."""
    lines = []
    for block in blocks(document, "bash"):
        block = re.sub(r"python -c '[^']*'", "", block.replace("\\\n", " "))
        lines += [shlex.split(line, comments=True) for line in block.splitlines()]
    return [found for line in lines if (found := split_command(line))]


def split_command(words: list[str]) -> tuple[str, list[str]] | None:
    """A module below vispec or a file in scripts/, and the words behind it; None where no such program is called.

    What stands before it (python -m, accelerate launch with its own flags) is not ours to check.
    """
    if not words or words[0] not in ("python", "accelerate", "sh"):
        return None
    place = next((place for place, word in enumerate(words) if _PROGRAM.fullmatch(word)), None)
    return None if place is None else (words[place], words[place + 1 :])


def programs() -> list[str]:
    """All programs of the package and of scripts/."""

    def found(folder: str) -> list[Path]:
        files = [path for path in (ROOT / folder).rglob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8")]
        return [path.relative_to(ROOT) for path in files]

    modules = [".".join(path.with_suffix("").parts).removesuffix(".__main__") for path in found("vispec")]
    return sorted(modules) + sorted(map(str, found("scripts")))


@cache
def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser that a program builds; it is stopped before it reads its arguments."""
    module = _module(program)

    def stop(parser, *args, **kwargs):
        raise _Built(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            module.main([])
        except _Built as built:
            return built.args[0]
    raise AssertionError(f"{program} builds no parser")


def flags_of(program: str) -> set[str]:
    return set(parser_of(program)._option_string_actions)


def flags_in(words: list[str]) -> set[str]:
    """The flags among the words of a command line."""
    return {word.split("=")[0] for word in words if word.startswith("--") and len(word) > 2}


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def anchors(document: Path) -> set[str]:
    """What a link can point to within a document: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", document.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(document: Path, head: str) -> list[list[str]]:
    """The cells of the rows of the one table whose head line begins so."""
    lines = document.read_text(encoding="utf-8").splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith(head)]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def _module(program: str) -> ModuleType:
    if program.startswith("scripts/"):
        return script(Path(program).stem)  # the shell scripts there pass their arguments on
    is_package = (ROOT / program.replace(".", "/")).is_dir()
    return importlib.import_module(f"{program}.__main__" if is_package else program)
