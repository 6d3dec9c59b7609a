"""What all command lines share: their flags' parser, one-line errors, provenance."""

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from vispec.children import end_with_parent
from vispec.version import __version__

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Of a target, as flags spell them; auto is the dtype of its files."""


class UserError(ValueError):
    """Something the user gave is wrong; the message is one line that names it."""


def parse_bool(text: str) -> bool:
    """`--flag=True`, `--flag=False`, in any case; also 1/0 and yes/no."""
    value = text.strip().lower()
    if value in ("true", "1", "yes"):
        return True
    if value in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a flag, and takes no abbreviations."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")

    def add_bool(self, flag: str, help: str) -> None:
        """A flag that is given as `--flag=True`; `--flag` alone means True."""
        self.add_argument(flag, type=parse_bool, nargs="?", const=True, default=False, metavar="True|False", help=help)

    def add_hardware(self, dtype: str | None = "auto") -> None:
        """Flags for how the target is loaded."""
        self.add_argument("--dtype", choices=DTYPES, default=dtype, help="auto: that of the target's files")
        self.add_argument(
            "--device-map",
            help="cpu, cuda:0, auto (spread over all GPUs), …; default: the first GPU if there is one",
        )


def count(text: str) -> int:
    """A whole number from 1 on, in 63 bits."""
    value = int(text) if text.strip().lstrip("+-").isdigit() else 0
    if not 1 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return value


def whole(text: str) -> int:
    """A whole number from 0 on, in 63 bits."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 on, found {text!r}")
    return int(text)


def number(text: str) -> float:
    """A number from 0 on."""
    return _number(text, "from 0 on", lambda value: 0 <= value < math.inf)


def limit(text: str) -> float:
    """A number above 0; inf limits nothing."""
    return _number(text, "above 0", lambda value: value > 0)


def share(text: str) -> float:
    """A number above 0, up to 1."""
    return _number(text, "above 0, up to 1", lambda value: 0 < value <= 1)


def _number(text: str, expected: str, holds: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not holds(value):
        raise argparse.ArgumentTypeError(f"expected a number {expected}, found {text!r}")
    return value


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


INTERRUPTED = "interrupted; what was written is whole"

DONE, ERROR, WITH_FAILURES = 0, 1, 3
"""Exit codes; the last one: done, but for items that failed, which the same command asks again."""


def worst(*codes: int) -> int:
    """The exit code of a run that has parts."""
    return ERROR if ERROR in codes else max(codes)


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a command and leave the process: errors of the user become one line on stderr and exit code 1."""
    end_with_parent()
    for stream in (sys.stdout, sys.stderr):
        # a terminal that lacks a character is no reason to end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = main() or 0
    except (ValueError, OSError) as error:
        say(f"error: {' '.join(str(error).split())}")
        if os.environ.get("VISPEC_TRACEBACK"):
            raise
        code = 1
    except KeyboardInterrupt:
        say(INTERRUPTED)
        code = 130
    sys.exit(code)


def say(line: str) -> None:
    """On a line of its own, also where a bar is being drawn."""
    tqdm = sys.modules.get("tqdm")
    (tqdm.tqdm.write if tqdm else print)(line, file=sys.stderr)


def leave_interrupted() -> NoReturn:
    """End the process at once, with the line and code of `run_cli`: for where an exception would not end it."""
    print(INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(130)


def tell_interrupts() -> None:
    """Let Ctrl-C during an import end the process with the line and code of `run_cli`.

    Elsewhere it stays a KeyboardInterrupt. In an import others may catch that one, and go on with half a module.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                leave_interrupted()
            frame = frame.f_back
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handler)


def changes(found: Mapping, asked: Mapping) -> str:
    """What differs between the arguments of a run that is there and those asked for now; "" where nothing does."""
    names = sorted(name for name in found.keys() | asked.keys() if found.get(name) != asked.get(name))
    return ", ".join(f"{name} {found.get(name)!r} there, {asked.get(name)!r} now" for name in names)


def provenance(args: argparse.Namespace | dict) -> dict:
    """What made a result: arguments, versions, git revision, machine."""
    arguments = args if isinstance(args, dict) else vars(args)
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "arguments": json.loads(json.dumps(arguments, default=str)),
        "versions": {
            "vispec": __version__,
            **{name: _version(name) for name in ("torch", "transformers", "accelerate", "numpy")},
        },
        "python": platform.python_version(),
        "git_revision": _git_revision(),
        "device": device_name(),
    }


def device_name(device: "torch.device | None" = None) -> str:
    """A GPU's name, or the CPU's and how many of its threads are used; None is the first GPU if there is one."""
    import torch

    kind = device.type if device else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads" if kind == "cpu" else kind


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of this checkout; None when the package is installed without one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
