"""Several models at a time: actors of Ray that share questions, or rows of data, some of which kill them."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from clusters import running_cluster
from fake_ray import ActorDied, OneProcess
from PIL import Image
from tiny_rows import contents, generate, write_rows

from vispec import ray_pool
from vispec.evaluation import actors, answerer, gen_baseline_answer_gqa
from vispec.evaluation.answerer import Ask
from vispec.evaluation.benchmarks import BENCHMARKS, Question
from vispec.evaluation.loading import Models
from vispec.evaluation.measure import Generation
from vispec.prompts import user_turn

TARGET = str(Path(__file__).parent / "golden" / "llava_next" / "target")
DEADLY = 4
"""A question that kills the process that opens its picture."""

DEADLY_DISK = """
import os, signal
flush = os.fsync
def fsync(file):
    flush(file)
    path = os.readlink(f"/proc/self/fd/{file}")
    if ".safetensors." in path:
        try:
            os.unlink(os.path.dirname(path) + ".deadly")
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
"""
"""What actors load first: where there is a file OUTDIR.deadly, the first one to write a sample dies of it."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster that runs already and was started in another folder."""
    loaded_first = tmp_path_factory.mktemp("disk")
    (loaded_first / "sitecustomize.py").write_text(DEADLY_DISK)
    with running_cluster([2], loaded_first):
        yield


def questions(tries: Path | None) -> list[Question]:
    """Five questions; a file in `tries` for each time that the deadly one was asked, which it is not without."""

    def picture(number: int) -> Callable[[], Image.Image]:
        # nested, so that it travels to the actors as code
        def open_it() -> Image.Image:
            if tries is not None and number == DEADLY:
                (tries / str(os.getpid())).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return Image.new("RGB", (40 + 4 * number, 48), "red")

        return open_it

    return [Question(number, (user_turn("What is it?", picture(number)),)) for number in range(5)]


def answer(monkeypatch, tmp_path: Path, name: str, tries: Path | None, *more: str) -> tuple[int, dict]:
    """The exit code, and the output ids by question."""
    benchmark = replace(BENCHMARKS["gqa"], load=lambda *_: questions(tries), samples=None)
    monkeypatch.setitem(BENCHMARKS, "gqa", benchmark)
    flags = ["--base-model-path", TARGET, "--data-folder", str(tmp_path), "--answer-file", str(tmp_path / name)]
    code = gen_baseline_answer_gqa.main([*flags, "--temperature", "0", "--max-new-token", "4", *more])
    lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    assert [line["question_id"] for line in lines] == sorted(line["question_id"] for line in lines)
    return code, {line["question_id"]: line["choices"][0]["output_ids"] for line in lines}


def test_a_question_that_actors_die_of_is_asked_again_and_given_up(cluster, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(answerer, "WARM_UPS", 1)
    code, alone = answer(monkeypatch, tmp_path, "alone", None)
    assert code == 0 and alone.keys() == set(range(5))
    tries = tmp_path / "tries"
    tries.mkdir()
    code, shared = answer(monkeypatch, tmp_path, "shared", tries, "--num-gpus-total", "2", "--device-map", "cpu")
    del alone[DEADLY]
    assert shared == alone and code == 3
    assert len(list(tries.iterdir())) == 2, "asked again, of another actor"
    printed = capfd.readouterr()
    assert "4 of 5 questions answered" in printed.out
    assert f"error: not answered, because the actors that tried died: {DEADLY}" in printed.err


def test_samples_by_actors_are_those_of_a_run_without(cluster, tmp_path, monkeypatch, capfd):
    """Two actors go on with a run that was killed; one of them dies while it writes a sample."""
    data, alone, out = write_rows(tmp_path / "data", images=9), tmp_path / "alone", tmp_path / "out"
    (data / "4.png").write_text("no picture")
    assert generate("image", "llava", data, alone) == 0
    shutil.copytree(alone, out)
    for path in [*out.glob("*1.safetensors"), *out.glob("*[5-8].safetensors"), out / "logs" / "rows_0.json"]:
        path.unlink()
    for left in ("00000001.safetensors", "mark"):
        (out / f".{left}.abcd1234.unfinished").touch()
    (tmp_path / "out.deadly").touch()
    monkeypatch.chdir(tmp_path)
    assert generate("image", "llava", data, Path("out"), "--ray", "2") == 0
    assert not (tmp_path / "out.deadly").exists()
    printed = capfd.readouterr().err
    assert "2 Ray actors begin, each with 0 GPU(s)" in printed and "an actor has died" in printed
    assert contents(out) == contents(alone)


@pytest.mark.parametrize("retrained", [False, True])
def test_an_actor_in_place_of_a_dead_one_has_the_same_models(monkeypatch, capsys, retrained):
    """The first of two actors dies of its first question; meanwhile the draft head may have been trained again."""
    made, asked = [], []

    class Actor:
        def __init__(self, models):
            self.number = len(made)
            made.append(self)

        def loaded_settings(self):
            head = "new" if retrained and self.number == 2 else "old"
            return {"baseline": {"devices": 1}, "vispec": {"devices": 1, "spec_model_sha256": head}}

        def answer(self, ask):
            asked.append((self.number, ask))
            if self.number == 0:
                raise ActorDied
            return [f"answer to {ask.question.question_id}"]

    ray = OneProcess()
    monkeypatch.setattr(ray_pool, "start_ray", lambda flag: ray)
    monkeypatch.setattr(actors, "Answerer", Actor)
    asks = [Ask(question, "gqa", Generation(0.0, 4), 1, ()) for question in questions(None)]
    with actors.loaded(Models("target", device_map="cpu"), 2) as shared:
        found = [(ask.question.question_id, outcomes) for ask, outcomes in shared.answers(asks)]
    assert sorted(found) == [(number, [f"answer to {number}"]) for number in range(5)], "each once"
    assert len(asked) == 6 and len(made) == 3
    assert any(number == 2 for number, _ in asked) is not retrained
    assert [actor.number for actor in ray.killed] == ([0, 2] if retrained else [0])
    printed = capsys.readouterr().err
    assert ("is not used, it has loaded spec_model_sha256 new and old\n" in printed) is retrained


class Nothing:
    def loaded_settings(self):
        return {}


@pytest.mark.parametrize(("gpus", "copies"), [(1, 7), (2, 3), (4, 1), (0.5, 14), (0.34, 21), (0, 3)])
def test_there_is_a_copy_for_all_gpus_of_each_machine(monkeypatch, gpus, copies, capsys):
    ray = OneProcess([{"GPU": 4.0}, {"GPU": 3.0}, {"CPU": 8.0}])
    monkeypatch.setattr(ray_pool, "start_ray", lambda flag: ray)
    ray_pool.Pool(Nothing, [], None, gpus, "--ray")
    assert f"{copies} Ray actors begin, each with {ray.options['num_gpus']:g} GPU(s)" in capsys.readouterr().err
    if gpus:
        with pytest.raises(ValueError, match=f"--ray: {copies + 1} copies of .* asked for, Ray has room for {copies}$"):
            ray_pool.Pool(Nothing, [], copies + 1, gpus, "--ray")


def test_gpus_that_no_model_would_get_are_refused():
    with pytest.raises(ValueError, match="--num-gpus-total 3: expected a multiple of --num-gpus-per-model 2"):
        with actors.loaded(Models("target", gpus=2), 3):
            pass


def test_without_ray_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"several models at a time need Ray: pip install 'vispec\[ray\]'"):
        answer(monkeypatch, tmp_path, "none", None, "--num-gpus-total", "2")
