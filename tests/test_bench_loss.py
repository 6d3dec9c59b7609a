"""The benchmark of the loss compares the same computation."""

import re
import sys

import pytest
import torch
from script_files import script

TINY = ["--device", "cpu", "--rows", "256", "--vocab", "20000", "--width", "16", "--dtype", "float32", "--runs", "1"]


@pytest.fixture
def bench():
    return script("bench_loss")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_both_arms_are_measured(bench, capsys):
    assert bench.main([*TINY, "--chunk", "4"]) == 0
    out = capsys.readouterr().out
    peaks = {arm: float(re.search(rf"^{arm} +([\d.]+) MiB", out, re.MULTILINE)[1]) for arm in bench.ARMS}
    ratio = float(re.search(r"memory ([\d.]+)", out)[1])
    assert peaks["at once"] > 3 * 256 * 20000 * 4 / 2**20  # the logits of all rows, several times
    assert ratio == pytest.approx(peaks["chunked"] / peaks["at once"], abs=0.01)
    assert ratio < 0.5


@pytest.mark.parametrize("objective", ["stage1", "l1", "ce"])
def test_both_arms_compute_the_same(bench, objective):
    args = bench.parse([*TINY, "--objective", objective, "--chunk", "3"])
    outs, targets, head = torch.randn(10, 2, 8), torch.randn(10, 8), torch.randn(50, 8)
    chunked, at_once = [bench.run(arm, args, outs, targets, head) for arm in bench.ARMS]
    torch.testing.assert_close(chunked, at_once)


def test_refusals(bench):
    with pytest.raises(ValueError, match="--rows 0: expected at least 1"):
        bench.parse(["--rows", "0"])
