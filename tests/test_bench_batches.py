"""The benchmark of batches answers the same questions in every arm."""

import importlib.util
import json
from pathlib import Path

import pytest

from vispec.demo import embedded

FAMILY = Path(__file__).parent / "golden" / "llava_next"
PATH = Path(__file__).parent.parent / "scripts" / "bench_batches.py"


@pytest.fixture
def bench():
    spec = importlib.util.spec_from_file_location("bench_batches", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_batch_size_is_measured(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(embedded, "TARGET", FAMILY / "target")
    monkeypatch.setattr(embedded, "DRAFT", FAMILY / "draft_vispec")
    file = tmp_path / "rows.json"
    options = ["--questions", "2", "--repetitions", "2", "--max-new-tokens", "6", "--json", str(file)]
    assert bench.main([*options, "--sizes", "1", "2"]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["arm"], row["batch"]) for row in rows] == [(arm, size) for size in (1, 2) for arm in bench.ARMS]
    assert all(len(row["tokens_per_second"]) == 2 and min(row["tokens_per_second"]) > 0 for row in rows)
    assert [row["equal"] for row in rows] == [2] * 4
    assert "| 2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--questions", "6", "--sizes", "4"], "--questions 6: expected a multiple of --sizes 4"),
        (["--target", "somewhere"], "--target and --draft go together"),
    ],
)
def test_flags_that_do_not_fit_are_refused(bench, flags, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(flags)
    assert message in capsys.readouterr().err
