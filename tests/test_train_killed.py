"""kill -9 at a random moment, the same command again: the weights of an unbroken run, bit for bit."""

import json
import random
import time
from pathlib import Path

import pytest
from forked_commands import finish, kill, start
from test_train_steps import EIGHT_SHAPES, write_data

GOLDEN = Path(__file__).parent / "golden" / "llava_next"
EPOCHS = 8


def epochs_done(cpdir: Path) -> int:
    path = cpdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def numbers(cpdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in (cpdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "samples_per_second")} for line in lines]


@pytest.mark.parametrize(("processes", "module"), [(1, "vispec.train.main"), (2, "vispec.train.main_mtp")])
def test_killed_and_started_again(tmp_path, processes, module):
    write_data(tmp_path / "data", EIGHT_SHAPES, size=64, vocabulary=37)
    arguments = ["--basepath", str(GOLDEN / "target"), "--configpath", str(GOLDEN / "draft_eagle2" / "config.json")]
    arguments += ["--tmpdir", str(tmp_path / "data"), "--bs", str(2 // processes), "--lr", "1e-3"]
    arguments += ["--num-epochs", str(EPOCHS), "--save-steps", "1", "--keep", "2"]
    unbroken, broken = [
        (tmp_path / name, [module, *arguments, "--cpdir", str(tmp_path / name)]) for name in ("unbroken", "broken")
    ]
    finish(unbroken[1], tmp_path / "log", processes)

    cpdir = broken[0]
    epoch, wait = random.randint(1, EPOCHS // 2), random.uniform(0, 0.1)
    started = start(broken[1], tmp_path / "log", processes)
    while all(process.is_alive() for process in started) and epochs_done(cpdir) < epoch:
        time.sleep(0.005)
    time.sleep(wait)
    kill(started)
    assert not (cpdir / f"state_{EPOCHS}").exists(), (tmp_path / "log").read_text()
    (cpdir / ".state_3.unfinished").mkdir(exist_ok=True)

    assert "goes on after epoch" in finish(broken[1], tmp_path / "log", processes)
    names = sorted(path.name for path in cpdir.iterdir())
    assert names == ["metrics.jsonl", "resume.pt", f"state_{EPOCHS - 1}", f"state_{EPOCHS}", "training.json"]
    ends = [(path / f"state_{EPOCHS}" / "model.safetensors").read_bytes() for path in (unbroken[0], cpdir)]
    assert ends[0] == ends[1], f"killed {wait:.3f} s after epoch {epoch}"
    assert numbers(unbroken[0]) == numbers(cpdir)
