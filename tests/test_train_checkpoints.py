"""What a training writes: checkpoints in any dtype, with the target's table or without, and an exact state beside."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_steps import EIGHT_SHAPES, write_data
from tiny_models import bare_head, recorded_case
from tiny_rows import CONFIGS, TARGETS

from vispec import SpecModel
from vispec.model.drafts import load_draft
from vispec.train import main, main_medusa, main_mtp
from vispec.train.states import RESUME_FILE
from vispec.train.target_weights import read_tables

TABLE = "embed_tokens.weight"
LEAN = ["--save-dtype", "bfloat16", "--save-embedding=False"]


@pytest.fixture
def arguments(tmp_path):
    data = write_data(tmp_path / "data", EIGHT_SHAPES, size=64, vocabulary=37)
    return ["--basepath", TARGETS["llava"], "--configpath", CONFIGS["llava"], "--tmpdir", str(data), "--bs", "4"]


def run(command, arguments, cpdir: Path, epochs: int, *more: str) -> dict[str, torch.Tensor]:
    """The tensors of the last checkpoint's file."""
    assert command.main([*arguments, "--cpdir", str(cpdir), "--num-epochs", str(epochs), "--lr", "1e-3", *more]) == 0
    return load_file(cpdir / f"state_{epochs}" / "model.safetensors")


@pytest.mark.parametrize("command", [main, main_mtp, main_medusa])
def test_a_checkpoint_has_what_was_asked_for(arguments, tmp_path, command):
    full = run(command, arguments, tmp_path / "full", 1)
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    assert torch.equal(full.pop(TABLE), read_tables(TARGETS["llava"])[0])
    assert all(torch.equal(full[name], load_draft(tmp_path / "full" / "state_1").state_dict()[name]) for name in full)
    half = run(command, arguments, tmp_path / "half", 1, "--save-dtype", "float16")
    assert half.keys() - full.keys() == {TABLE} and {tensor.dtype for tensor in half.values()} == {torch.float16}
    lean = run(command, arguments, tmp_path / "lean", 1, *LEAN)
    assert lean.keys() == full.keys()
    assert all(torch.equal(lean[name], full[name].bfloat16()) for name in full)


def test_what_a_run_goes_on_from_is_exact_and_without_the_table(arguments, tmp_path, monkeypatch):
    """The last weights are those of an unbroken run, though the checkpoints before were rounded."""
    unbroken = run(main_mtp, arguments, tmp_path / "unbroken", 3)
    stop = iter((True, False))
    monkeypatch.setattr("vispec.train.trainer.prune_states", lambda *_: next(stop) or pytest.exit("killed"))
    with pytest.raises(pytest.exit.Exception):
        run(main_mtp, arguments, tmp_path / "broken", 3, *LEAN)
    monkeypatch.undo()
    state = torch.load(tmp_path / "broken" / RESUME_FILE, weights_only=True)
    assert state["head"].keys() == unbroken.keys() - {TABLE}
    assert {tensor.dtype for tensor in state["head"].values()} == {torch.float32}
    found = run(main_mtp, arguments, tmp_path / "broken", 3)
    assert found.keys() == unbroken.keys() and all(torch.equal(found[name], unbroken[name]) for name in unbroken)


def test_stage_2_begins_with_a_head_without_a_table(arguments, tmp_path):
    run(main, arguments, tmp_path / "one", 1)
    lean = tmp_path / "lean" / "state_1"
    load_draft(tmp_path / "one" / "state_1").save_pretrained(lean, embedding=False)
    assert TABLE not in load_file(lean / "model.safetensors")
    full, found = (
        run(main_mtp, arguments, tmp_path / f"two_{name}", 1, "--loadpath", str(tmp_path / name / "state_1"))
        for name in ("one", "lean")
    )
    assert found.keys() == full.keys() and all(torch.equal(found[name], full[name]) for name in full)


def test_a_head_trains_with_its_target_s_own_table(arguments, tmp_path):
    """One that was rounded, or of a target that was tuned since, does not come back with the checkpoint."""
    before = bare_head(load_draft(Path(CONFIGS["llava"]).parent).config, "eagle2", seed=1)
    table = read_tables(TARGETS["llava"])[0]
    before.embed_tokens.weight.data.copy_(table + 0.01 * torch.randn(table.shape))
    before.save_pretrained(tmp_path / "before", torch.bfloat16)
    found = run(main, arguments, tmp_path / "cp", 1, "--loadpath", str(tmp_path / "before"))
    assert torch.equal(found[TABLE], table)


def test_a_head_without_a_table_decodes(arguments, tmp_path):
    run(main_mtp, arguments, tmp_path / "cp", 1, *LEAN)
    folder = str(tmp_path / "cp" / "state_1")
    with pytest.raises(ValueError, match=f"no {TABLE}, and no target to take it from"):
        load_draft(folder)
    model = SpecModel.from_pretrained(TARGETS["llava"], folder)
    assert model.draft.embed_tokens.weight.data_ptr() == model.target.embed_tokens.weight.data_ptr()
    inputs = recorded_case("llava_next", "vispec", 0).inputs
    expected = model.target.model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=24), expected)
