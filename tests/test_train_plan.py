"""--dry-run: right numbers, nothing written."""

import re
from pathlib import Path

import pytest
import torch
from launching import command, finish
from test_train_steps import EIGHT_SHAPES, write_data

from vispec.ge_data.sample_file import make_sample, read_sample
from vispec.train import main, main_eagle3, main_medusa, main_msd, main_mtp
from vispec.train.plan import marked_text
from vispec.train.samples import hold_out

GOLDEN = Path(__file__).parent / "golden" / "llava_next"


@pytest.fixture
def arguments(tmp_path):
    write_data(tmp_path / "data", EIGHT_SHAPES, size=64, vocabulary=37)
    shared = ["--basepath", str(GOLDEN / "target"), "--configpath", str(GOLDEN / "draft_vispec" / "config.json")]
    return [*shared, "--tmpdir", str(tmp_path / "data"), "--cpdir", str(tmp_path / "cp"), "--bs", "2"]


def test_the_plan_of_a_run(arguments, tmp_path, capsys):
    assert main_mtp.main([*arguments, "--num-epochs", "5", "--num-q", "3", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    train, (held,) = hold_out(sorted((tmp_path / "data").iterdir()))
    samples, held_out = [read_sample(path) for path in train], read_sample(held)
    assert re.search(
        rf"samples +7, held out 1\ntokens +{sum(map(len, samples))}, held out {len(held_out)}; .* 60\n", plan
    )
    assert f"images        {sum(len(sample.images) for sample in samples)}, held out {len(held_out.images)}\n" in plan
    # the mask of each sample ends one before its end, and pair i stands for token i+2
    scored = sum(int(sample.loss_mask[2:].sum()) for sample in samples)
    assert f"scored pairs  {scored}, held out {int(held_out.loss_mask[2:].sum())}\n" in plan
    assert "cut           0 of all samples by 0 tokens together, to --max-len 4,096; 0 have nothing to score\n" in plan
    assert "steps         4 an epoch of 2 samples each, 20 in 5 epochs\n" in plan
    trained = int(re.search(r"parameters +([\d,]+) trained, 2,432 frozen", plan)[1].replace(",", ""))  # 38 x 64
    assert f"MiB  AdamW's two moments: {trained:,} x 8 bytes" in plan
    sizes = [float(value) for value in re.findall(r"([\d.]+) MiB", plan)]
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.1 * len(sizes))
    assert plan.split("⟦")[1].count("⟧") == 1
    assert not (tmp_path / "cp").exists()


def test_the_plan_of_a_run_that_goes_on(arguments, tmp_path, capsys):
    more = ["--num-epochs", "2", "--lr", "1e-3"]
    assert main.main([*arguments, *more]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cp").rglob("*")}
    capsys.readouterr()
    assert main.main([*arguments, *more, "--dry-run", "--begin-epoch", "2"]) == 0
    assert "8 in 2 epochs; 8 of them are done" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--begin-epoch 1: --cpdir .* is at epoch 2"):
        main.main([*arguments, *more, "--dry-run", "--begin-epoch", "1"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cp").rglob("*")} == before


def test_the_plan_tells_what_is_cut(arguments, tmp_path, capsys):
    """EIGHT_SHAPES has samples of 9, 40, 23, 30, 12, 17, 14 and 60 tokens, some with images around the 13th."""
    assert main.main([*arguments, "--max-len", "13", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    cuts = [read_sample(path).cut(13) for path in sorted((tmp_path / "data").iterdir())]
    lost = 9 + 40 + 23 + 30 + 12 + 17 + 14 + 60 - sum(map(len, cuts))
    empty = sum(not sample.scored().any() for sample in cuts)
    assert empty and len(cuts[1]) == 3
    line = f"cut           6 of all samples by {lost} tokens together, to --max-len 13; {empty} have nothing to score\n"
    assert line in plan


def test_processes_plan_once_and_part_in_order(arguments, tmp_path):
    text = finish(command(2, "-m", "vispec.train.main_mtp", *arguments, "--dry-run"), tmp_path / "log")
    assert text.count("plan of this run") == text.count("starts from random weights") == 1
    assert "2 an epoch of 4 samples each" in text
    assert "warn" not in text.lower() and "destroy_process_group" not in text


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        (main, ["--clip-value", "0.5", "--clip-norm", "1"], "--clip-norm: not allowed with argument --clip-value"),
        (main, ["--clip-norm", "0"], "--clip-norm: expected a number above 0, found '0'"),
        (main, ["--keep", "-1"], "--keep: expected a whole number from 0 on, found '-1'"),
        (main, ["--lr", "nan"], "--lr: expected a number from 0 on, found 'nan'"),
        (main, ["--noise=-0.2"], "--noise: expected a number from 0 on, found '-0.2'"),
        (main, ["--bs", "0"], "--bs: expected a whole number from 1 on, found '0'"),
        (main, ["--save-dtype", "int8"], "--save-dtype: invalid choice: 'int8'"),
        (main, ["--pw", "much"], "--pw: expected a number from 0 on, found 'much'"),
        (main_mtp, ["--num-q", "0"], "--num-q: expected a whole number from 1 on, found '0'"),
        (main_mtp, ["--mtp-steps", "-1"], "--mtp-steps: expected a whole number from 0 on, found '-1'"),
        (main_eagle3, ["--ttt-length", "0"], "--ttt-length: expected a whole number from 1 on, found '0'"),
        (main_msd, ["--bs", "x"], "--bs: expected a whole number from 1 on, found 'x'"),
        (main_medusa, ["--bs", "x"], "--bs: expected a whole number from 1 on, found 'x'"),
    ],
)
def test_a_flag_that_makes_no_sense_is_named_in_one_line(arguments, command, more, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([*arguments, *more])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: argument {message}") and error.count("\n") == 1


def test_scored_tokens_are_marked():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "target")
    ids = tokenizer("a dog").input_ids + [37, 37, 37, 37, 37] + tokenizer("what is it? a cat. so?").input_ids
    ids = torch.tensor(ids)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[-10:-4] = True  # " a cat."
    mask[-1] = True
    mask[0] = True  # no pair predicts the first two tokens
    embeds = torch.zeros(len(ids), 4)
    start = len(ids) - 22 - 5
    sample = make_sample(ids, mask, [(start, start + 2), (start + 2, start + 5)], embeds, embeds)
    text = marked_text(sample, tokenizer)
    assert text == "a dog<image of 2 rows><image of 3 rows>what is it? ⟦a cat.⟧ so⟦?⟧"
