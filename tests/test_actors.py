"""Several models at a time: actors of Ray that share the questions, some of which kill them."""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vispec.evaluation import answering, gen_baseline_answer_gqa
from vispec.evaluation.benchmarks import BENCHMARKS, Question
from vispec.prompts import user_turn

ROOT = Path(__file__).parent.parent
TARGET = str(Path(__file__).parent / "golden" / "llava_next" / "target")
DEADLY_ONCE, DEADLY = 2, 4
"""Questions that kill the process that opens their picture: the first time only, and always."""

PATIENCE = {"RAY_agent_register_timeout_ms": "600000", "RAY_worker_register_timeout_seconds": "600"}
"""Ray's own limits are short for a machine that is busy."""


def questions(tries: Path | None) -> list[Question]:
    """Five questions; a file in `tries` for each time that a deadly one was asked, none of them is deadly without."""

    def picture(number: int) -> Callable[[], Image.Image]:
        # nested, so that it travels to the actors as code
        def open_it() -> Image.Image:
            if tries is not None and number in (DEADLY_ONCE, DEADLY):
                before = len(list(tries.glob(f"{number}-*")))
                (tries / f"{number}-{before}").touch()
                if number == DEADLY or before == 0:
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


def test_questions_of_actors_that_die_are_asked_again(tmp_path, monkeypatch, capfd):
    pytest.importorskip("ray")
    monkeypatch.setattr(answering, "WARM_UPS", 1)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    for name, value in PATIENCE.items():
        monkeypatch.setenv(name, value)
    code, alone = answer(monkeypatch, tmp_path, "alone", None)
    assert code == 0 and alone.keys() == set(range(5))
    tries = tmp_path / "tries"
    tries.mkdir()
    code, shared = answer(monkeypatch, tmp_path, "shared", tries, "--num-gpus-total", "2", "--device-map", "cpu")
    del alone[DEADLY]
    assert shared == alone and code == 1
    assert {path.name for path in tries.iterdir()} == {"2-0", "2-1", "4-0", "4-1"}
    printed = capfd.readouterr()
    assert "4 of 5 questions answered" in printed.out
    assert f"error: not answered, because the actors that tried died: {DEADLY}" in printed.err


def test_without_ray_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"several models at a time need Ray: pip install 'vispec\[ray\]'"):
        answer(monkeypatch, tmp_path, "none", None, "--num-gpus-total", "2")
