"""The first rounds of `make soak`, which finds what it is there to find."""

import logging

import pytest
import torch

from tests.fuzz.kills import contents
from tests.fuzz.soak import soak
from vispec import SpecModel


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "vispec")  # which pass decodes, for every model anew


def test_random_decoding(tmp_path):
    found = soak(("decoding",), seed=0, minutes=5, rounds=16, folder=tmp_path)
    assert not found.failures
    assert found.counts["prompts"] > 8 and found.counts["comparisons"] > 30 and found.counts["accepted tokens"] > 100


def test_other_tokens_are_told_with_their_seed(tmp_path, monkeypatch, capsys):
    generate = SpecModel.generate

    def wrong(self, *args, **options):
        answer = generate(self, *args, **options)
        if options.get("return_dict_in_generate"):
            answer.sequences[0, -1] += 1
        return answer

    monkeypatch.setattr(SpecModel, "generate", wrong)
    found = soak(("decoding",), seed=3, minutes=5, rounds=3, folder=tmp_path)
    assert found.counts["mismatches"] == len(found.failures) > 0
    assert capsys.readouterr().out.startswith("FAILED decoding, seed ")
    assert found.report().endswith(f"{len(found.failures)} failures")


def test_files_are_compared_without_what_a_clock_says(tmp_path):
    def write(folder, seconds: float, weight: float) -> dict:
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(f'{{"epoch": 1, "seconds": {seconds}}}\n')
        (folder / "sample.safetensors").write_bytes(b"x")
        torch.save({"head": {"w": torch.tensor(weight)}, "seconds": seconds}, folder / "resume.pt")
        return contents(folder)

    first = write(tmp_path / "a", 1.0, 0.5)
    assert first == write(tmp_path / "b", 2.0, 0.5) != write(tmp_path / "c", 2.0, 0.25)
    assert first.keys() == {"metrics.jsonl", "sample.safetensors", "resume.pt"}
