"""Training of SpecVLM's head: the loss falls, the gate moves, the head decodes; stored features and computed agree."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_steps import EIGHT_SHAPES, write_data
from tiny_models import generate as generate_by_target
from tiny_models import image_prompt
from tiny_rows import CONFIGS, TARGETS, generate, write_rows

from vispec import SpecModel
from vispec.model.drafts import load_draft
from vispec.train import main_mtp, specvlm
from vispec.train.samples import SampleFolder, collate, find_samples
from vispec.train.specvlm import prompt_lengths


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of LLaVA samples with images, with and without features."""
    folder = tmp_path_factory.mktemp("samples")
    data = write_rows(folder / "data")
    for store in ("pairs", "tokens"):
        assert generate("image", "llava", data, folder / store, "--store", store) == 0
    return folder


def run(folder, cpdir, *more):
    arguments = ["--method", "specvlm", "--basepath", TARGETS["llava"], "--configpath", CONFIGS["llava"]]
    return main_mtp.main([*arguments, "--tmpdir", str(folder), "--cpdir", str(cpdir), "--lr", "1e-3", *more])


def test_the_loss_falls_and_the_head_decodes(made, tmp_path):
    assert run(made / "pairs", tmp_path / "cp", "--num-epochs", "6") == 0
    lines = [json.loads(line) for line in (tmp_path / "cp" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train"]["loss"] < 0.9 * lines[0]["train"]["loss"]
    rates = [line["lr"] for line in lines]
    assert rates == sorted(rates, reverse=True) and rates[0] > 8e-4, "no warm-up"
    head = load_draft(str(tmp_path / "cp" / "state_6"))
    bias = head.compressor.gate[-1].bias
    assert (head.method, head.compressor.how.mode) == ("specvlm", "select") and bias.abs().max() > 1e-4
    model = SpecModel.from_pretrained(TARGETS["llava"], str(tmp_path / "cp" / "state_6"), tree="12/3/4")
    inputs = image_prompt(model.target.model, 1, ".a.")
    answer = model.specgenerate(**inputs, max_new_tokens=12)
    assert answer.tolist() == generate_by_target(model.target.model, inputs, max_new_tokens=12).tolist()


def test_features_that_the_target_computes_now(made, tmp_path):
    found = []
    for store, more in (("pairs", ()), ("tokens", ("--online",))):
        assert run(made / store, tmp_path / store, "--num-epochs", "2", "--bs", "2", *more) == 0
        found.append(load_file(tmp_path / store / "state_2" / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-5)


def test_a_prompt_ends_where_the_answer_begins(made):
    paths = find_samples([str(made / "pairs")])
    samples = SampleFolder(paths, 4096)
    items = [samples[(index, None)] for index in range(3)]
    expected = [int(sample.loss_mask.nonzero()[0]) for sample, _ in items]
    batch = collate(items)
    assert prompt_lengths(batch) == expected
    batch.scored = batch.scored[:0]
    assert prompt_lengths(batch) == batch.lengths


def test_goes_on_bit_for_bit_and_in_any_batches(tmp_path, monkeypatch):
    """What the gate draws is the sample's and the epoch's own."""
    write_data(tmp_path / "data", EIGHT_SHAPES, size=64, vocabulary=37)

    def run_of(name, *more):
        return run(tmp_path / "data", tmp_path / name, "--num-epochs", "3", "--save-steps", "1", *more)

    assert run_of("unbroken", "--bs", "2") == 0
    update = specvlm.SpecVLMTrainer.update

    def dies(self, step):
        if step == 4:
            raise KeyboardInterrupt
        update(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(specvlm.SpecVLMTrainer, "update", dies)
        with pytest.raises(KeyboardInterrupt):
            run_of("broken", "--bs", "2")
    assert run_of("broken", "--bs", "2") == 0
    files = [tmp_path / name / "state_3" / "model.safetensors" for name in ("unbroken", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert run_of("single", "--gradient-accumulation-steps", "2") == 0
    for name, tensor in load_file(tmp_path / "single" / "state_3" / "model.safetensors").items():
        torch.testing.assert_close(tensor, load_file(files[0])[name], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="--compressor concat: the draft head's is select"):
        run_of("unbroken", "--bs", "2", "--compressor", "concat")


def test_a_head_to_start_from(tmp_path):
    write_data(tmp_path / "data", EIGHT_SHAPES, size=64, vocabulary=37)
    head = str(Path(CONFIGS["llava"]).parent.parent / "draft_eagle2")

    def run_of(name, *more):
        return run(tmp_path / "data", tmp_path / name, "--num-epochs", "1", "--bs", "8", "--lr", "0", *more)

    assert run_of("first", "--compressor", "concat", "--loadpath", head) == 0
    begun, eagle = load_draft(str(tmp_path / "first" / "state_1")), load_draft(head)
    assert begun.compressor.how.mode == "concat" and torch.equal(begun.fc.weight, eagle.fc.weight)
    first = str(tmp_path / "first" / "state_1")
    assert run_of("second", "--loadpath", first) == 0
    assert load_draft(str(tmp_path / "second" / "state_1")).compressor.how.mode == "concat"
    with pytest.raises(ValueError, match="--compressor select: the draft head's is concat"):
        run_of("third", "--loadpath", first, "--compressor", "select")
    config = tmp_path / "config.json"
    described = json.loads((tmp_path / "first" / "state_1" / "config.json").read_text())
    described["compressor"]["pool"] = 5
    config.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"--configpath .*: compressor is .*'pool': 5.*, the draft head's .*: 20"):
        run_of("third", "--loadpath", first, "--configpath", str(config))
    with pytest.raises(ValueError, match="config.json: compressor has mode 'concat', 'weight' was asked for"):
        run_of("third", "--compressor", "weight", "--configpath", str(config))


def test_without_a_compressor_image_features_are_read(made, tmp_path):
    with pytest.raises(ValueError, match="features of image positions are not stored"):
        run(made / "pairs", tmp_path / "cp", "--compressor", "none")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use-ours=True", "--method", "specvlm"], "--method specvlm and --use-ours=True: found both"),
        (["--use-ours=False", "--method", "vispec"], "--method vispec and --use-ours=False: found both"),
        (["--compressor", "concat"], "--method vispec does not take --compressor concat"),
        (["--use-ours=False", "--compressor", "concat"], "--method eagle2 does not take --compressor concat"),
        (["--method", "specvlm", "--mtp-steps", "1", "--loss", "ce"], "specvlm does not take --mtp-steps 1, --loss ce"),
        (["--method", "specvlm", "--num-q", "2", "--blind"], "specvlm does not take --num-q 2, --blind True"),
    ],
)
def test_flags_of_another_method(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        main_mtp.main(["--basepath", "b", "--tmpdir", str(tmp_path), "--cpdir", str(tmp_path / "cp"), *flags])
