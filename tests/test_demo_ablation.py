"""The ablation and the curves, with a recorded tiny target in place of the embedded one."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image
from tiny_rows import CONFIGS, TARGETS, generate, write_rows

from vispec.cli import UserError
from vispec.demo import ablation, curves, runner, tau
from vispec.model.drafts import load_draft
from vispec.train import main, main_mtp
from vispec.train.metrics import MetricsLog

QUICK = ["--epochs", "1", "--questions", "2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What rebuild.sh leaves: target/model, data, images, stage1 and stage2."""
    folder = tmp_path_factory.mktemp("work")
    rows = write_rows(folder / "data" / "LLaVA-Pretrain")
    (folder / "target").mkdir()
    (folder / "target" / "model").symlink_to(TARGETS["llava"])
    for stage, run, first in (("text", main, "stage1"), ("image", main_mtp, "stage2")):
        data = folder / {"text": "text", "image": "images"}[stage]
        assert generate(stage, "llava", rows, data, "--store", "all") == 0
        shared = ["--basepath", TARGETS["llava"], "--configpath", CONFIGS["llava"], "--lr", "1e-3"]
        assert run.main([*shared, "--tmpdir", str(data), "--cpdir", str(folder / first), "--num-epochs", "2"]) == 0
    return folder


@pytest.fixture
def started(monkeypatch):
    """Commands run in this process, with short answers; returns the names of those that were run."""
    names = []

    def run_here(commands, logs, jobs):
        for name, (module, *arguments) in commands.items():
            names.append(f"{module} {name}")
            assert import_module(module).main(arguments) == 0

    monkeypatch.setattr(ablation, "run_side_by_side", run_here)
    monkeypatch.setattr(runner, "MAX_NEW_TOKENS", 12)
    return names


def test_every_variant_has_a_row(work, started, tmp_path, capsys):
    out = tmp_path / "ablation"
    assert ablation.main(["--work", str(work), "--out", str(out), "--seeds", "0", *QUICK]) == 0
    printed = capsys.readouterr().out
    for variant in ablation.VARIANTS:
        assert f"| {variant.text} |" in printed
    assert "all heads gave the same answers: yes" in printed
    rows = {row["variant"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert rows.keys() == {variant.name for variant in ablation.VARIANTS}
    assert rows["reference"]["held_out"]["samples"] == rows["eagle2"]["held_out"]["samples"] == 1

    heads = {name: load_draft(out / f"{name}_0" / "state_1") for name in rows if name != "stage1"}
    assert heads["eagle2"].method == "eagle2"
    assert {name: head.num_q for name, head in heads.items() if name != "eagle2"} == {
        "start": 2, "reference": 2, "blind": 2, "mtp0": 2, "mtp1": 2, "l1": 2, "q5": 5,
    }  # fmt: skip
    assert not heads["blind"].imadpt.o_proj.weight.any() and heads["reference"].imadpt.o_proj.weight.any()
    first = load_draft(work / "stage1" / "state_2").state_dict()
    for name, tensor in first.items():
        assert tensor.equal(heads["start"].state_dict()[name])


def test_what_is_there_is_not_made_again(work, started, tmp_path, capsys):
    arguments = ["--work", str(work), "--out", str(tmp_path), "--variants", "reference", "stage1", *QUICK]
    assert ablation.main([*arguments, "--seeds", "0"]) == 0
    assert started[:1] == ["vispec.train.main_mtp reference_0"]
    before = (tmp_path / "tau" / "reference_0.json").stat().st_mtime_ns
    started.clear()
    assert ablation.main([*arguments, "--seeds", "0", "1"]) == 0
    assert [name for name in started if "train" in name] == ["vispec.train.main_mtp reference_1"]
    assert (tmp_path / "tau" / "reference_0.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds other trainings .epochs 1 there, 3 now"):
        ablation.main([*arguments, "--epochs", "3"])
    commands = json.loads((tmp_path / "settings.json").read_text())["commands"]
    assert commands.keys() == {"reference_0", "reference_1"}
    loaded = work / "stage1" / "state_2"
    assert commands["reference_0"].startswith("python -m vispec.train.main_mtp --basepath=")
    assert f" --loadpath={loaded} " in commands["reference_0"] and " --seed=0 " in commands["reference_0"]


def test_other_command_lines_are_refused(work, started, tmp_path, monkeypatch):
    arguments = ["--work", str(work), "--out", str(tmp_path), "--variants", "l1", *QUICK, "--seeds", "0", "0"]
    assert ablation.main(arguments) == 0
    assert len(started) == 2  # one training and one measurement
    monkeypatch.setitem(ablation.FLAGS, "--bs", "8")
    with pytest.raises(
        UserError, match="other trainings .l1_0 'python .* --bs=16 .*' there, 'python .* --bs=8 .*' now"
    ):
        ablation.main(arguments)


def test_a_training_killed_before_it_could_note_its_end_goes_on(work, started, tmp_path, monkeypatch):
    arguments = ["--work", str(work), "--out", str(tmp_path), "--variants", "l1", *QUICK, "--seeds", "0"]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(MetricsLog, "epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            ablation.main(arguments)
    assert (tmp_path / "l1_0" / "state_1").is_dir()
    assert ablation.main(arguments) == 0
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["held_out"]["samples"] == 1


def test_a_cell_has_the_mean_and_each_seed():
    rows = [
        {"variant": "l1", "seed": seed, "tau": dict.fromkeys(tau.TREES, value), "held_out": {"top1": value / 10}}
        for seed, value in ((0, 2.0), (1, 2.5))
    ]
    line = ablation.table(rows, [v for v in ablation.VARIANTS if v.name == "l1"], [0, 1]).splitlines()[-1]
    cell = "2.250 (2.000, 2.500)"
    assert line == f"| l1, the released loss | {cell} | {cell} | 0.225 (0.200, 0.250) |"


def test_the_reference_is_stage_2_of_the_rebuild():
    script = Path(ablation.__file__).with_name("rebuild.sh").read_text()
    command = script.split("vispec.train.main_mtp")[1].split("\n\n")[0].replace("=", " ")
    apart = {"--basepath", "--configpath", "--loadpath", "--tmpdir", "--cpdir", "--num-epochs", "--save-dtype"}
    given = dict(re.findall(r"(--[\w-]+) (\S+)", command))
    assert {name: value for name, value in given.items() if name not in apart} == ablation.FLAGS


def test_commands_run_side_by_side(tmp_path, monkeypatch):
    (tmp_path / "fake_command.py").write_text("import sys; print('no memory'); sys.exit(int(sys.argv[1]))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ablation.run_side_by_side({str(i): ["fake_command", "0"] for i in range(3)}, tmp_path / "logs", jobs=2)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["0.log", "1.log", "2.log"]
    with pytest.raises(UserError, match="bad ended with exit code 3: no memory"):
        ablation.run_side_by_side({"bad": ["fake_command", "3"]}, tmp_path / "logs", jobs=2)


def test_the_curves(work, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "MAX_NEW_TOKENS", 12)
    figure = tmp_path / "training.png"
    assert curves.main(["--work", str(work), "--figure", str(figure), "--questions", "2"]) == 0
    with Image.open(figure) as picture:
        assert picture.width > 1000
    heads = json.loads((work / "tau.json").read_text())["heads"]
    assert sorted(heads) == [str(work / stage / f"state_{epoch}") for stage in curves.STAGES for epoch in (1, 2)]
    with pytest.raises(UserError, match=r"stage1/metrics.jsonl: no such file; rebuild.sh makes it"):
        curves.main(["--work", str(tmp_path)])


def test_tau_is_measured_again_for_other_weights(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "MAX_NEW_TOKENS", 12)
    head, file = tmp_path / "head", tmp_path / "tau.json"
    command = ["--model", TARGETS["llava"], "--drafts", str(head), "--questions", "1", "--json", str(file)]
    found = []
    for source in ("state_1", "state_2"):
        head.unlink(missing_ok=True)
        head.symlink_to(work / "stage2" / source)
        assert tau.main(command) == 0
        found.append(json.loads(file.read_text())["heads"][str(head)])
    assert found[0]["weights"] != found[1]["weights"]
    assert found[0]["trees"].keys() == found[1]["trees"].keys() == set(tau.TREES)
    monkeypatch.setattr(tau, "load_model", lambda *arguments, **options: pytest.fail("measured twice"))
    assert tau.main(command) == 0
    assert f"{head}: τ {found[1]['trees'][tau.TREES[0]]['tau']:.3f} at {tau.TREES[0]}" in capsys.readouterr().out
    with pytest.raises(UserError, match="other measurements .questions 1 there, 2 now"):
        tau.main([*command, "--questions", "2"])
