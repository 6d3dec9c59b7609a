"""Questions about one's own picture."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from forked_commands import finish
from PIL import Image

from vispec import embedded, generate
from vispec.model import tune
from vispec.model.policies import Auto, AutoAnswer
from vispec.model.shape import TreeShape
from vispec.model.target import Target

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"


def pair(family: str, method: str) -> list[str]:
    folder = GOLDEN / family
    return ["--base-model-path", str(folder / "target"), "--spec-model-path", str(folder / f"draft_{method}")]


@pytest.fixture
def picture(tmp_path) -> str:
    path = tmp_path / "x.png"
    Image.new("RGB", (50, 40), "green").save(path)
    return str(path)


@pytest.mark.parametrize(("family", "method"), [("llava_next", "vispec"), ("llava_next", "eagle2")])
def test_answer_and_comparison(family, method, picture, capsys):
    flags = ["--image", picture, "--image", picture, "--max-new-tokens", "20", "--compare", "--tree", "30/3/8"]
    flags += ["--method", method]
    assert generate.main([*pair(family, method), *flags, "What is this?"]) == 0
    printed = capsys.readouterr().out
    assert f"{method} " in printed and "tokens/s" in printed and "τ " in printed
    for name in ("our own plain loop", "transformers' own generate()"):
        assert f": {name}\n" in printed and f"x over {name}, outputs identical: yes" in printed
    assert "\x1b[" not in printed


def test_lookup_needs_no_draft_head(picture, capsys):
    flags = ["--method", "lookup", "--image", picture, "--max-new-tokens", "30", "--compare", "what is this?"]
    assert generate.main([*pair("llava_next", "vispec")[:2], *flags]) == 0
    printed = capsys.readouterr().out
    assert "lookup " in printed and "outputs identical: yes" in printed


def test_embedded_default(picture, capsys, monkeypatch):
    monkeypatch.setattr(embedded, "TARGET", GOLDEN / "llava_next" / "target")
    monkeypatch.setattr(embedded, "DRAFT", GOLDEN / "llava_next" / "draft_vispec")
    seen = {}
    load = generate.load_model
    monkeypatch.setattr(generate, "load_model", lambda *a, **k: seen.update(k) or load(*a, **k))
    assert generate.main(["--image", picture, "What is this?", "--max-new-tokens", "3", "--depth", "2"]) == 0
    shape = replace(embedded.TREE, depth=2)
    assert seen["dtype"] == "float32" and seen["tree"] == shape
    assert "3 tokens in" in capsys.readouterr().out
    assert generate.main(["--image", picture, "What is this?", "--max-new-tokens", "3"]) == 0
    assert seen["tree"] == "auto"


@pytest.mark.parametrize("more", [[], ["--tree", "auto"], ["--method", "lookup"]])
def test_trees_are_chosen_unless_one_is_asked_for(more, picture, capsys, monkeypatch):
    """The closing line counts what the first trials bring: plain steps, and rounds with a draft."""
    steps = []
    learn = AutoAnswer.learn
    monkeypatch.setattr(AutoAnswer, "learn", lambda self, *round_: steps.append(round_) or learn(self, *round_))
    models = pair("llava_next", "vispec")[: 2 if "lookup" in more else 4]
    assert generate.main([*models, *more, "--image", picture, "--max-new-tokens", "40", "what is this?"]) == 0
    accepted = [one.accepted for shape, rounds in steps for one in rounds if shape is not None]
    plain = sum(shape is None for shape, _ in steps)
    assert accepted and plain
    tau = f"τ {sum(accepted) / len(accepted):.2f} draft tokens accepted a round"
    assert f", {tau}, {plain} plain steps without a draft (" in capsys.readouterr().out


def test_an_answer_without_any_draft(picture, capsys, monkeypatch):
    monkeypatch.setattr(Auto, "decide", lambda self: self.trials.clear())
    flags = ["--image", picture, "--max-new-tokens", "5", "--compare", "what is this?"]
    assert generate.main([*pair("llava_next", "vispec"), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    (spec,) = [line for line in lines if line.startswith("vispec ")]
    assert spec.endswith(" s), 4 plain steps without a draft (float32)")
    (plain,) = [line for line in lines if line.startswith("baseline ")]
    assert "step" not in plain


@pytest.mark.parametrize("tree", [["--tree", "6/2/2"], ["--total-token", "6", "--depth", "2", "--top-k", "2"]])
def test_one_tree_in_two_spellings(tree, picture, capsys, monkeypatch):
    seen = {}
    load = generate.load_model
    monkeypatch.setattr(generate, "load_model", lambda *a, **k: seen.update(k) or load(*a, **k))
    generate.main([*pair("llava_next", "vispec"), *tree, "--image", picture, "--max-new-tokens", "9", "what is this?"])
    assert seen["tree"] == TreeShape(6, 2, 2) and "plain step" not in capsys.readouterr().out


def test_terminal_gets_colours(picture, capsys, monkeypatch):
    monkeypatch.setattr(generate, "wants_colour", lambda stream: True)
    flags = ["--tree", "30/3/8", "--image", picture, "--max-new-tokens", "40", "what is this?"]
    generate.main([*pair("llava_next", "vispec"), *flags])
    assert "\x1b[32m" in capsys.readouterr().out


def test_what_lies_behind_the_answers_end_is_not_in_tau(picture, capsys, monkeypatch):
    answers = []
    stream = generate.stream_question
    monkeypatch.setattr(generate, "stream_question", lambda *given: answers.append(stream(*given)) or answers[-1])
    flags = [*pair("llava_next", "vispec")[:2], "--method", "lookup", "--tree", "30/3/8", "--image", picture, "what?"]
    generate.main([*flags, "--max-new-tokens", "40"])
    lengths = answers[0].acceptance_lengths
    cut = next(number for number, accepted in enumerate(lengths) if accepted > 1)
    end = 1 + sum(lengths[:cut]) + cut  # the tokens before that round, so that it gives its first one only
    capsys.readouterr()
    generate.main([*flags, "--max-new-tokens", str(end + 1)])
    answer = answers[1]
    assert answer.acceptance_lengths == lengths[: cut + 1] and len(answer.output_ids) == end + 1
    said = (sum(lengths[:cut]) + 1) / (cut + 1)
    assert f", τ {said:.2f} draft tokens" in capsys.readouterr().out


def test_measured_tree(picture, capsys, monkeypatch):
    monkeypatch.setattr(tune, "SHAPES", (TreeShape(2, 0, 1), TreeShape(8, 3, 4)))
    monkeypatch.setattr(tune, "REPETITIONS", 1)
    flags = ["--tree", "tune", "--image", picture, "--max-new-tokens", "20", "--compare", "What is this?"]
    assert generate.main([*pair("llava_next", "vispec"), *flags]) == 0
    printed = capsys.readouterr().out
    assert "\nchosen: " in printed and "times as fast as 30/3/8 in this run" in printed
    assert "outputs identical: yes" in printed


@pytest.mark.parametrize("size", ["0", "-2", "1", "many"])
def test_impossible_sizes_of_a_tree(size, capsys):
    with pytest.raises(SystemExit):
        generate.main(["--total-token", size, "what?"])
    assert "--total-token: expected a whole number from 2 on, or -1 to measure" in capsys.readouterr().err


@pytest.mark.parametrize("tree", ["30", "30/3", "30/3/8/1", "1/3/8", "30/-3/8", "fast", ""])
def test_impossible_trees(tree, capsys):
    with pytest.raises(SystemExit):
        generate.main(["--tree", tree, "what?"])
    printed = capsys.readouterr().err
    assert printed.startswith("error: argument --tree: ") and printed.count("\n") == 1
    assert "such as 30/3/8" in printed or "total_token must be at least 2, found 1" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--spec-model-path", "nowhere/at/all", "what?"], "nowhere/at/all"),
        (["--spec-subfolder", "elsewhere", "what?"], "draft_vispec: no config.json there, subfolder elsewhere$"),
        (["--method", "eagle2", "what?"], "eagle2"),
        (["--method", "lookup", "what?"], "--spec-model-path .*draft_vispec: --method lookup has no draft head"),
    ],
)
def test_user_errors(flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        generate.main([*pair("llava_next", "vispec"), *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "missing.png", "what?"], "^--image missing.png: cannot be read as a picture .no such file.$"),
        (["--image", __file__, "what?"], f"^--image {__file__}: cannot be read as a picture .damaged, no picture"),
        (["--image", str(ROOT), "what?"], f"^--image {ROOT}: cannot be read as a picture .IsADirectoryError"),
        (["--temperature", "-1", "what?"], "^temperature must not be negative, found -1.0$"),
        (["--temperature", "nan", "what?"], "^temperature must be a finite number, found nan$"),
        (["--top-p", "1.5", "what?"], "^top_p must be between 0 and 1, found 1.5$"),
        (["--depth", "-1", "what?"], "^depth must be at least 0, found -1$"),
        (["--tree", "auto", "--top-k", "2", "what?"], "^--tree and --top-k both say what the tree is, expected only"),
        (["--total-token", "-1", "--tree", "9/2/2", "what?"], "^--tree and --total-token both say what the tree is"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(flags, message, monkeypatch):
    for name in ("load_processor", "load_model"):
        monkeypatch.setattr(generate, name, lambda *_, **__: pytest.fail("loaded before the check"))
    with pytest.raises(ValueError, match=message):
        generate.main([*pair("llava_next", "vispec"), *flags])


@pytest.mark.parametrize("flags", [["--max-new-tokens", "0"], ["--top-k", "0"]])
def test_counts_from_one_on(flags, capsys):
    with pytest.raises(SystemExit) as left:
        generate.main([*flags, "what?"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: argument {flags[0]}: expected a whole number from 1 on")


@pytest.mark.parametrize("more", [[], ["--compare"], ["--total-token", "-1"]])
def test_a_prompt_that_is_too_long_is_refused_before_decoding(more, monkeypatch, capsys):
    monkeypatch.setattr(Target, "prefill", lambda *_, **__: pytest.fail("work before the check"))
    with pytest.raises(ValueError, match=r"^the prompt has \d+ tokens, the target has 1024 positions$"):
        generate.main([*pair("llava_next", "vispec"), *more, "what is this? " * 600])
    assert capsys.readouterr().out == ""


def test_half_a_pair_and_missing_weights(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="belong together"):
        generate.main(["--base-model-path", "x", "what?"])
    monkeypatch.setattr(embedded, "TARGET", tmp_path / "weights" / "target")
    with pytest.raises(ValueError, match=r"vispec/demo/rebuild\.sh"):
        generate.main(["what?"])


def test_help_comes_without_the_libraries_that_take_seconds():
    code = (
        "import sys, importlib\n"
        "for name in sys.argv[1:]:\n"
        "    try: importlib.import_module(name).main(['--help'])\n"
        "    except SystemExit: pass\n"
        "sys.exit(' '.join({'torch', 'transformers'} & sys.modules.keys()) or 0)\n"
    )
    names = ["vispec.generate", "vispec.evaluation.gen_spec_answer_gqa", "vispec.evaluation.run_all"]
    names += ["vispec.evaluation.bench", "vispec.demo.trees", "vispec.demo.tau"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *names], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("usage: ") == len(names), done.stderr


def test_as_a_command(picture, tmp_path):
    command = [sys.executable, "-m", "vispec.generate", *pair("llava_next", "vispec"), "--max-new-tokens", "5"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--image", picture, "what?"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "vispec " in done.stdout, done.stderr
    wrong = finish([*command[2:], "--image", "no.png", "what?"], tmp_path / "log", code=1)
    assert wrong.strip().splitlines()[-1] == "error: --image no.png: cannot be read as a picture (no such file)"
    assert "Traceback" not in wrong
