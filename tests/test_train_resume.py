"""What a training goes on from: a state that is checked, without the samples that spoil it, in processes that agree."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import command, finish
from safetensors.torch import load_file
from test_train_steps import EIGHT_SHAPES, make_trainer, write_data
from tiny_rows import CONFIGS, TARGETS, contents

from vispec import locks
from vispec.ge_data.sample_file import read_sample, write_sample
from vispec.train import main, main_mtp
from vispec.train.processes import launched_processes
from vispec.train.samples import SampleFolder, find_samples, hold_out
from vispec.train.states import RESUME_FILE


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data", EIGHT_SHAPES, size=64, vocabulary=37)


@pytest.fixture
def arguments(data):
    return ["--basepath", TARGETS["llava"], "--configpath", CONFIGS["llava"], "--tmpdir", str(data), "--bs", "2"]


def weights(cpdir, epoch):
    return load_file(cpdir / f"state_{epoch}" / "model.safetensors")


def test_a_run_goes_on_without_the_head_it_began_from(arguments, tmp_path, monkeypatch):
    first, cpdir = tmp_path / "first", tmp_path / "second"
    assert main_mtp.main([*arguments, "--cpdir", str(first), "--num-epochs", "1", "--num-q", "3"]) == 0
    (state,) = first.glob("state_*")
    second = [*arguments, "--loadpath", str(state), "--num-epochs", "3", "--cpdir"]
    assert main_mtp.main([*second, str(tmp_path / "unbroken")]) == 0
    stop = iter((True, False))
    monkeypatch.setattr("vispec.train.trainer.prune_states", lambda *_: next(stop) or pytest.exit("killed"))
    with pytest.raises(pytest.exit.Exception):
        main_mtp.main([*second, str(cpdir)])
    monkeypatch.undo()
    shutil.rmtree(first)
    with pytest.raises(ValueError, match="loadpath '.*state_1' there, '.*other' now"):
        main_mtp.main([*arguments, "--num-epochs", "3", "--cpdir", str(cpdir), "--loadpath", str(tmp_path / "other")])
    assert main_mtp.main([*arguments, "--num-epochs", "3", "--cpdir", str(cpdir)]) == 0
    found, expected = weights(cpdir, 3), weights(tmp_path / "unbroken", 3)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    starts = json.loads((cpdir / "training.json").read_text())
    assert starts["arguments"]["loadpath"] == str(state)
    assert [one["arguments"]["loadpath"] for one in starts["resumed"]] == [None]


def test_a_sample_that_spoils_training_is_skipped(arguments, data, tmp_path):
    run = [*arguments, "--cpdir", str(tmp_path / "cp"), "--num-epochs", "2"]
    train, (held,) = hold_out(find_samples([data]))
    for path in (train[3], held):
        sample = read_sample(path)
        sample.hidden[-3] = torch.nan
        write_sample(path, sample)
    with pytest.raises(ValueError, match=f"not finite in .*{train[3].name}; .*--skip goes on without them"):
        main.main(run)
    with pytest.raises(ValueError, match=f"held-out samples is not finite in .*{held.name}; .*--skip goes on without"):
        main.main([*run, "--skip", train[3].name])
    for name, message in (("nobody", "no sample of --tmpdir"), (str(data / "7"), "no sample")):
        with pytest.raises(ValueError, match=f"--skip {name}: {message}"):
            main.main([*run, "--skip", name])
    with pytest.raises(ValueError, match="--skip .*: no sample is left to train on"):
        main.main([*run, "--skip", *map(str, train)])
    # what is left out may be of another width, also where it is the first
    sample = read_sample(train[0])
    sample.hidden = sample.hidden[:, :5]
    sample.image_embeds = sample.image_embeds[:, :5]
    write_sample(train[0], sample)
    skipped = ["--skip", train[0].name, train[3].name, str(held)]
    assert main.main([*run, *skipped, "--dry-run"]) == 0
    assert main.main([*run, *skipped]) == 0
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "cp", 2).values())
    lines = [json.loads(line) for line in (tmp_path / "cp" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train"]["samples"], line["held_out"]) for line in lines] == [
        (4, 6, None),
        (8, 5, None),
    ]


def test_a_skipped_sample_changes_no_other(tmp_path):
    """A step whose samples are all skipped changes nothing; the others keep order and noise."""
    folder = write_data(tmp_path / "data")
    trainer = make_trainer(folder, tmp_path / "a", epochs=1)
    trainer.train_set.kept.remove(2)
    seen = []
    trainer.accumulate, accumulate = lambda batches: seen.extend(batches) or accumulate(batches), trainer.accumulate
    trainer.run()
    every = make_trainer(folder, tmp_path / "b", epochs=1)
    all_seen = []
    every.accumulate, accumulate_all = (
        lambda batches: all_seen.extend(batches) or accumulate_all(batches),
        every.accumulate,
    )
    every.run()
    kept = [batch for batch in all_seen if not batch.names[0].endswith("00000002.safetensors")]
    assert len(seen) == len(kept) == len(all_seen) - 1
    for one, other in zip(seen, kept, strict=True):
        assert one.names == other.names and torch.equal(one.hidden, other.hidden)


def test_a_finished_run_writes_nothing(arguments, tmp_path, monkeypatch, capsys):
    run = [*arguments, "--cpdir", str(tmp_path / "cp"), "--num-epochs", "1"]
    assert main.main(run) == 0
    before = contents(tmp_path / "cp")

    def read_only(path, *_):
        raise OSError(30, "Read-only file system", str(path))

    for name in ("vispec.files.tempfile.mkstemp", "vispec.locks.os.open"):
        monkeypatch.setattr(name, read_only)
    assert main.main(run) == 0
    assert "all 1 epochs are done" in capsys.readouterr().out
    assert contents(tmp_path / "cp") == before and locks.FOLDER_LOCK not in before


@pytest.mark.parametrize(
    ("name", "content"), [("metrics.jsonl", '{"my": 1}\n'), ("training.json", "[]"), ("training.json", "my notes")]
)
def test_a_folder_of_others_is_refused(arguments, tmp_path, name, content):
    (tmp_path / "cp" / "state_7").mkdir(parents=True)
    (tmp_path / "cp" / name).write_text(content)
    before = contents(tmp_path / "cp")
    run = [*arguments, "--cpdir", str(tmp_path / "cp"), "--num-epochs", "1"]
    message = f"--cpdir .*cp holds {', '.join(sorted((name, 'state_7')))}, but no resume.pt to go on from"
    with pytest.raises(ValueError, match=message):
        main.main(run)
    assert contents(tmp_path / "cp") == before


def test_notes_beside_the_files_of_a_training_stay(arguments, tmp_path):
    notes = {"notes.txt": b"1", "state_of_affairs/notes.txt": b"2", ".metrics.jsonl.bak": b"3"}
    for name, content in notes.items():
        path = tmp_path / "cp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    run = [*arguments, "--cpdir", str(tmp_path / "cp"), "--num-epochs", "1"]
    assert main.main(run) == 0
    assert contents(tmp_path / "cp").items() >= notes.items()


def broken(name, value):
    def change(state):
        state[name] = value
        return state

    return change


def with_weight(value):
    def change(state):
        state["head"]["fc.bias"] = value(state["head"]["fc.bias"])
        return state

    return change


def with_moment(value):
    def change(state):
        state["moments"][0]["exp_avg"] = value(state["moments"][0]["exp_avg"])
        return state

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken("format", 3), "format 3, expected 4"),
        (lambda state: [state], "format None, expected 4"),
        (lambda state: torch.zeros(3), "format None, expected 4"),
        (broken("step_in_epoch", 99), "epoch 1, step 99; the run has 3 epochs of 3 steps"),
        (broken("step_in_epoch", -1), "step_in_epoch is -1"),
        (broken("step_in_epoch", "1"), "step_in_epoch is str, expected int"),
        (broken("epoch", 1.5), "epoch is float, expected int"),
        (broken("epoch", True), "epoch is bool, expected int"),
        (broken("seconds", float("nan")), "seconds is nan"),
        (broken("sums", [1.0]), "sums are not"),
        (broken("sums", ["x"] * 22), "sums are not"),
        (broken("identity", None), "identity is NoneType, expected dict"),
        (broken("head", {}), "missing or unexpected weights"),
        (with_weight(lambda tensor: tensor[1:]), r"fc.bias is \(15,\)"),
        (with_weight(lambda tensor: tensor * torch.nan), "fc.bias is not finite"),
        (with_weight(lambda tensor: tensor.tolist()), "head holds something else than tensors"),
        (with_moment(lambda tensor: tensor.tolist()), "exp_avg 0 is list, expected a tensor"),
        (broken("draft_vocab", {"x": 1}), "draft_vocab is no draft vocabulary"),
        (broken("identity", {"config": [1]}), "the draft head's config is none"),
        (broken("moments", {0: {}}), "moments of 1 parameters"),
        (with_moment(lambda tensor: tensor[1:]), r"exp_avg 0 is \("),
        (with_moment(lambda tensor: tensor.double()), "exp_avg 0 is .*float64"),
    ],
)
def test_a_state_that_is_none_is_refused_by_name(tmp_path, change, message):
    folder = write_data(tmp_path / "data")
    settings = {"epochs": 3, "batch_size": 2}
    trainer = make_trainer(folder, tmp_path / "cp", **settings)
    trainer.evaluate, evaluate = lambda: trainer.epoch == 1 and pytest.exit("killed") or evaluate(), trainer.evaluate
    with pytest.raises(pytest.exit.Exception):
        trainer.run()
    path = tmp_path / "cp" / RESUME_FILE
    state = torch.load(path, weights_only=True)
    assert make_trainer(folder, tmp_path / "cp", **settings).resume()
    torch.save(change(state), path)
    with pytest.raises(ValueError, match=rf"resume\.pt: {message}"):
        make_trainer(folder, tmp_path / "cp", **settings).resume()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_state_that_is_cut_off_is_refused_by_name(tmp_path, share):
    trainer = make_trainer(write_data(tmp_path / "data"), tmp_path / "cp")
    trainer.save()
    path = tmp_path / "cp" / RESUME_FILE
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"resume\.pt: cut off, or no state of a training") as error:
        trainer.resume()
    assert "\n" not in str(error.value)


def test_processes_that_find_different_states_stop(tmp_path, monkeypatch):
    trainer = make_trainer(write_data(tmp_path / "data"), tmp_path / "cp")
    trainer.save()
    trainer.processes = type("", (), {"count": 2, "is_main": True, "gather": lambda self, own: [*own, *others(own)]})()
    others = list
    assert trainer.resume()
    for found in ((1, 0), (0, 0, "another digest")):
        others = lambda own, found=found: [found + own[0][len(found) :]]  # noqa: E731
        with pytest.raises(ValueError, match=r"--cpdir \S*cp: the processes would go on from different states"):
            trainer.resume()


def test_nothing_to_score(arguments, tmp_path, capsys):
    with pytest.raises(ValueError, match="no token of an answer is scored in any of 7 training samples"):
        main.main([*arguments, "--cpdir", str(tmp_path / "cut"), "--max-len", "2", "--num-epochs", "1"])
    assert not list((tmp_path / "cut").glob("state_*"))
    trainer = make_trainer(write_data(tmp_path / "others"), tmp_path / "cp", epochs=1)
    path = tmp_path / "held" / "00000000.safetensors"
    (mute := read_sample(trainer.train_set.paths[0])).loss_mask[:] = False
    write_sample(path, mute)
    trainer.held_out_set = SampleFolder([path], 64)
    trainer.run()
    assert "; held out: nothing that is scored;" in capsys.readouterr().out
    assert json.loads((tmp_path / "cp" / "metrics.jsonl").read_text())["held_out"] is None


def test_accelerate_s_settings_of_another_project(monkeypatch):
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "true")
            with pytest.raises(ValueError, match=f"{name}=true is set"):
                launched_processes()
            patch.setenv(name, "false")
            assert launched_processes().count == 1


def test_it_is_said_how_many_processes_train(arguments, tmp_path, monkeypatch):
    """With --cpu, accelerate launch starts one process whatever it is asked for."""
    run = ["-m", "vispec.train.main", *arguments, "--cpdir", str(tmp_path / "cp"), "--num-epochs", "1"]
    launch = command(2, *run)
    cpu = launch[:3] + ["--cpu"] + [word for word in launch[3:] if word != "--multi_gpu"]
    text = finish(cpu, tmp_path / "log")
    assert "accelerate launch was asked for 2 processes and started 1" in text
    assert "4 steps an epoch of 2 samples: 1 process x batches of 2 x 1 accumulated" in text
