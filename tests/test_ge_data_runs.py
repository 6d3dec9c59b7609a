"""Whole runs of the data commands: killed, shared by workers, split into shards, and what they report."""

import random
import shutil
import sys
import threading
import time

import pytest
import torch
from forked_commands import ROOT, finish, kill, slow_disk, start
from safetensors.torch import load_file
from tiny_rows import (
    CONFIGS,
    TARGETS,
    contents,
    generate,
    manifest_of,
    read_questions,
    write_questions,
    write_rows,
)

from vispec.ge_data import workers
from vispec.ge_data.report import full_matrices
from vispec.ge_data.sample_file import read_length
from vispec.ge_data.sources import load_image
from vispec.train import main_mtp


def sample_files(folder):
    return {name: content for name, content in contents(folder).items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight image rows, of which the second and the sixth in shuffled order are bad."""
    folder = write_rows(tmp_path_factory.mktemp("data"), images=8)
    rows = load_image(str(folder))
    questions = read_questions(folder)
    questions[rows.order[1]]["image"] = "gone.png"
    questions[rows.order[5]]["conversations"][0]["value"] = "no tag"
    write_questions(folder, questions)
    return folder


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert generate("image", "llava", data, out) == 0
    return out


# --- killed ---


def kill_when(started, ready, delay):
    (process,) = started
    while not ready():
        assert process.is_alive(), "the run ended before it was killed"
        time.sleep(0.002)
    time.sleep(delay)
    kill(started)
    assert process.exitcode == -9


def test_a_killed_run_ends_with_the_same_files(data, tmp_path):
    """kill -9 while the manifest is written, while samples are written, and at moments that a coin decides."""
    command = ["vispec.ge_data.allocation_llava_pretrain_gen", "--outdir", "out", "--model", TARGETS["llava"]]
    command += ["--data-folder", str(data), "--batch-size", "3", "--max-new-tokens", "12"]
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    finish(command, tmp_path / "log", folder=tmp_path / "whole")
    out, coin = tmp_path / "killed" / "out", random.Random(0)

    def writing(pattern, done):
        return lambda: any(out.glob(pattern)) and len(list(out.glob("0*.safetensors"))) >= done

    moments = [
        writing(".manifest.json.*", 0),
        writing(".0*.safetensors.*", 0),
        writing(".0*.safetensors.*", 2),
        writing("manifest.json", 4),
    ]
    halves = 0
    for ready in moments:
        started = start(command, tmp_path / "log", folder=tmp_path / "killed", before=slow_disk)
        kill_when(started, ready, coin.uniform(0, 0.3))
        halves += any(out.glob(".*"))
        assert not (out / "manifest.json").is_file() or not manifest_of(out)["complete"]
    assert halves >= 1
    finish(command, tmp_path / "log", folder=tmp_path / "killed")
    assert contents(out) == contents(tmp_path / "whole" / "out")
    assert manifest_of(out)["complete"] and manifest_of(out)["samples"] == 6


# --- workers ---

WORKER = """
import os, sys, time
worker = sys.argv[sys.argv.index("--worker") + 1]
if worker == "1/3":
    print("one line\\n" * 40 + "no memory left", flush=True)
    {ending}
time.sleep(0.3)
with open(os.path.join(sys.argv[1], worker.replace("/", "_of_")), "w") as file:
    file.write(os.environ["CUDA_VISIBLE_DEVICES"])
"""


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("1 / 0", 1)])
def test_a_worker_that_dies_is_reported_and_the_others_finish(tmp_path, monkeypatch, capsys, ending, code):
    (tmp_path / "fake_worker.py").write_text(WORKER.format(ending=ending))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    groups = ["0,1", "2,3", "4,5"]
    assert workers.run_workers("fake_worker", [str(tmp_path)], groups, tmp_path / "logs") == code
    assert (tmp_path / "0_of_3").read_text() == "0,1"
    assert (tmp_path / "2_of_3").read_text() == "4,5"
    errors = capsys.readouterr().err
    assert f"worker 1 ended with exit code {code}" in errors
    assert str(tmp_path / "logs" / "worker_1.log") in errors
    assert "no memory left" in errors
    assert errors.count("one line") < 20


def test_a_worker_s_death_is_reported_while_the_others_work(tmp_path, monkeypatch):
    """The first worker ends only when it sees what has been said about the second one."""
    (tmp_path / "fake_worker.py").write_text(
        "import os, sys, time\n"
        "if sys.argv[-1] == '1/2': sys.exit(4)\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    class Reports:
        def write(self, text):
            if "worker 1 ended with exit code 4" in text:
                (tmp_path / "said").touch()

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stderr", Reports())
    watch = threading.Timer(60, (tmp_path / "said").write_text, ["too late"])
    watch.start()
    assert workers.run_workers("fake_worker", [str(tmp_path / "said")], ["0", "1"], tmp_path / "logs") == 4
    watch.cancel()
    assert (tmp_path / "said").read_text() == ""


def test_workers_make_the_files_of_one_process(data, unbroken, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert generate("image", "llava", data, tmp_path / "out") == 0
    assert sample_files(tmp_path / "out") == sample_files(unbroken)
    for worker in range(2):
        assert "image samples: 100%" in (tmp_path / "out" / "logs" / f"worker_{worker}.log").read_text()
    skipped = manifest_of(tmp_path / "out")["skipped"]
    assert skipped == manifest_of(unbroken)["skipped"]
    assert skipped == {
        "image tag missing": {"count": 1, "rows": [5]},
        "unreadable image": {"count": 1, "rows": [1]},
    }
    assert "skipped, image tag missing: 1 (rows 5)" in capsys.readouterr().out


def test_a_failed_worker_leaves_the_run_unfinished(data, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(workers, "run_workers", lambda *arguments: 7)
    assert generate("image", "llava", data, tmp_path / "out") == 7
    assert not manifest_of(tmp_path / "out")["complete"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--start", "5", "--end", "4"], "--start 5 --end 4: expected start <= end"),
        (["--start", "-1"], "--start: expected a whole number from 0 on, found '-1'"),
        (["--max-len", "0"], "--max-len: expected a whole number from 1 on, found '0'"),
        (["--temperature=-1"], "--temperature: expected a number from 0 on, found '-1'"),
        (["--min-pixels", "9000"], "--min-pixels 9000: expected at most --max-pixels 7056"),
    ],
)
def test_flags_that_make_no_sense_are_refused(data, tmp_path, more, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as refused:
        generate("image", "qwen", data, tmp_path / "out", *more)
    assert message in f"{refused.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


# --- shards ---


def test_shards_of_several_machines_are_trained_on_together(data, unbroken, tmp_path):
    assert generate("image", "llava", data, tmp_path / "a", "--end", "2") == 0
    assert generate("image", "llava", data, tmp_path / "b", "--start", "3") == 0
    a, b = sample_files(tmp_path / "a"), sample_files(tmp_path / "b")
    assert a and b and not a.keys() & b.keys()
    assert {**a, **b} == sample_files(unbroken)
    weights = []
    for name, folders in (("together", [tmp_path / "a", tmp_path / "b"]), ("whole", [unbroken])):
        arguments = ["--basepath", TARGETS["llava"], "--configpath", CONFIGS["llava"], "--num-epochs", "1"]
        arguments += ["--lr", "1e-3", "--tmpdir", *map(str, folders), "--cpdir", str(tmp_path / name)]
        assert main_mtp.main(arguments) == 0
        weights.append(load_file(tmp_path / name / "state_1" / "model.safetensors"))
    for key, value in weights[1].items():
        assert torch.equal(weights[0][key], value), key


# --- the report ---


def test_a_finished_run_writes_nothing(data, unbroken, tmp_path, monkeypatch):
    """So it may lie where nothing can be written."""
    out = shutil.copytree(unbroken, tmp_path / "out")
    monkeypatch.setattr("vispec.files.tempfile.mkstemp", lambda *a, **k: pytest.fail("a file was written"))
    assert generate("image", "llava", data, out) == 0
    assert contents(out) == contents(unbroken)


def test_the_report_compares_with_full_matrices(data, unbroken, tmp_path, capsys):
    manifest = manifest_of(unbroken)
    lengths = [read_length(path) for path in unbroken.glob("*.safetensors")]
    # features and embeddings of 64 float32 numbers, an id of eight bytes, two masks of one
    assert manifest["reference_bytes"] == sum(length * (2 * 64 * 4 + 8 + 2) for length in lengths)
    assert manifest["bytes"] == sum(map(len, sample_files(unbroken).values()))
    assert 0.3 < manifest["bytes"] / manifest["reference_bytes"] < 0.8
    assert generate("text", "llava", data, tmp_path / "text", "--store", "tokens") == 0
    manifest = manifest_of(tmp_path / "text")
    assert manifest["reference_bytes"] == manifest["tokens"] * (64 * 4 + 8 + 1)
    printed = capsys.readouterr().out
    assert f"{manifest['reference_bytes'] / manifest['samples']:,.0f} bytes each" in printed
    assert f"ratio {manifest['bytes'] / manifest['reference_bytes']:.3g}" in printed


def test_full_matrices_follow_the_dtype():
    for dtype, size in (("auto", 4), ("float32", 4), ("bfloat16", 2)):
        full = full_matrices("image", TARGETS["qwen"], dtype)
        assert (full.item, full.bytes(10)) == (size, 10 * (2 * 64 * size + 8 + 2))
