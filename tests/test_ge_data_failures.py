"""Rows that fail end no data run: the others become samples, and the same command tries the failed ones again."""

import json

import pytest
from safetensors.torch import load_file
from tiny_rows import generate, manifest_of, turn, write_rows

from vispec.ge_data import jobs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"), images=8)


def failing_for(prompts_of, poison):
    """generate_answers that runs out of memory for prompts of more tokens than `poison`, and for any two together."""

    def answers(target, prompts, *rest, **options):
        if len(prompts) > 1 or prompts[0]["input_ids"].shape[1] >= poison:
            raise RuntimeError("CUDA out of memory.\nTried to allocate 20 GiB")
        return prompts_of(target, prompts, *rest, **options)

    return answers


def test_a_row_that_fails_ends_no_run_and_is_tried_again(data, tmp_path, monkeypatch, capsys):
    whole = tmp_path / "whole"
    flags = ["--max-new-tokens", "4", "--batch-size", "3"]
    assert generate("image", "llava", data, whole, *flags) == 0
    lengths = {path.name: load_file(path)["input_ids"].shape[0] for path in whole.glob("*.safetensors")}
    longest = max(lengths.values()) - 4
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "generate_answers", failing_for(jobs.generate_answers, longest))
        assert generate("image", "llava", data, tmp_path / "out", *flags) == 3
    manifest = manifest_of(tmp_path / "out")
    ((reason, entry),) = manifest["failed"].items()
    assert reason == "RuntimeError: CUDA out of memory. Tried to allocate 20 GiB"
    assert 0 < entry["count"] < len(lengths) and manifest["samples"] == len(lengths) - entry["count"]
    assert f"error: {entry['count']} row(s) failed; the same command tries them again" in capsys.readouterr().err
    assert generate("image", "llava", data, tmp_path / "out", *flags) == 0
    manifest = manifest_of(tmp_path / "out")
    assert manifest["failed"] == {} and manifest["samples"] == len(lengths)


def test_a_text_row_that_fails_ends_no_run(tmp_path, monkeypatch):
    good = [turn("human", "what?"), turn("gpt", "a dog.")]
    bad = [turn("human", "why?"), turn("gpt", "a cat.")]
    (tmp_path / "text.json").write_text(json.dumps([{"conversations": one} for one in (good, bad, good)]))
    read = jobs.read_turns

    def fail(row):
        if row["conversations"] == bad:
            raise RecursionError("too deep")
        return read(row)

    monkeypatch.setattr(jobs, "read_turns", fail)
    assert generate("text", "llava", tmp_path, tmp_path / "out", "--store", "tokens") == 3
    manifest = manifest_of(tmp_path / "out")
    assert manifest["samples"] == 2 and manifest["failed"]["RecursionError: too deep"]["count"] == 1


def test_a_run_that_makes_nothing_fails(tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a dog."}]}] * 2
    (tmp_path / "text.json").write_text(json.dumps(rows))
    assert generate("text", "llava", tmp_path, tmp_path / "out", "--store", "tokens") == 1
    assert "none of 2 rows became a sample" in capsys.readouterr().err
