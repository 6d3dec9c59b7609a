"""The answer files of both arms, over a tiny local COCO and the recorded tiny models."""

import json
import shutil
from pathlib import Path

import pytest
from benchmark_rows import write_coco

from vispec.evaluation import answerer, speed
from vispec.evaluation import gen_baseline_answer_coco_caption as baseline_command
from vispec.evaluation import gen_spec_answer_coco_caption as spec_command
from vispec.evaluation.benchmarks import BENCHMARKS
from vispec.evaluation.flags import asked_tree
from vispec.evaluation.loading import Models
from vispec.evaluation.run_one import make_parser
from vispec.model.drafts import MedusaHead, load_draft
from vispec.model.drafts.checkpoints import read_config, save_draft
from vispec.model.shape import TreeShape
from vispec.prompts import RefusedPrompt

FAMILY = Path(__file__).parent / "golden" / "llava_next"
TARGET, VISPEC, EAGLE2 = (str(FAMILY / name) for name in ("target", "draft_vispec", "draft_eagle2"))
IDS = [70, 10, 50, 20, 40]


@pytest.fixture(autouse=True)
def _one_warm_up(monkeypatch):
    monkeypatch.setattr(answerer, "WARM_UPS", 1)


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """Five test images, one of them named twice, and one of the training split; written by hand from the layout."""
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder, [*IDS, 99, 10], training=[99])
    return folder


def run_baseline(coco: Path, out: Path, *more: str) -> Path:
    flags = ["--base-model-path", TARGET, "--data-folder", str(coco), "--answer-dir", str(out)]
    flags += ["--model-id", "tiny-plain"]
    baseline_command.main([*flags, "--temperature", "0", "--max-new-token", "12", *more])
    return out / "coco_caption" / "tiny-plain-temperature-0.0.jsonl"


def run_spec(coco: Path, out: Path, *more: str) -> Path:
    flags = ["--base-model-path", TARGET, "--spec-model-path", VISPEC, "--use-ours=True", "--data-folder", str(coco)]
    flags += ["--answer-dir", str(out), "--model-id", "tiny-ours", "--temperature", "0", "--max-new-token", "12"]
    spec_command.main([*flags, *more])
    return out / "coco_caption" / "tiny-ours-temperature-0.0.jsonl"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(coco, tmp_path_factory) -> tuple[Path, Path]:
    """Answer files of both arms; tests copy them before they change anything."""
    out = tmp_path_factory.mktemp("answers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answerer, "WARM_UPS", 1)
        return run_baseline(coco, out), run_spec(coco, out)


def copy_of(path: Path, folder: Path) -> Path:
    """The answer file with its settings, laid out under another --answer-dir."""
    target = folder / "coco_caption" / path.name
    shutil.copytree(path.parent, target.parent)
    return target


def test_both_arms_write_the_same_answers(finished):
    baseline, spec = map(read, finished)
    assert [line["question_id"] for line in baseline] == sorted(IDS) == [line["question_id"] for line in spec]
    for plain, ours in zip(baseline, spec, strict=True):
        assert plain["choices"][0]["output_ids"] == ours["choices"][0]["output_ids"]
        assert plain["choices"][0]["turns"] == ours["choices"][0]["turns"]


def test_line_format(finished):
    plain, ours = read(finished[0])[0], read(finished[1])[0]
    fields = {"question_id", "answer_id", "model_id", "tstamp", "method", "choices"}
    assert plain.keys() == ours.keys() == fields
    assert (plain["method"], ours["method"]) == ("baseline", "vispec")
    (choice,) = ours["choices"]
    assert choice.keys() - plain["choices"][0].keys() == {"acceptance_length"}
    assert choice["captured"] == plain["choices"][0]["captured"] == "none"
    assert choice["index"] == 0
    # products over one token in both arms, those over a tree's tokens in one of them
    assert plain["choices"][0]["kernels"] and choice["kernels"].keys() - plain["choices"][0]["kernels"].keys()
    (ids,) = choice["output_ids"]
    assert choice["new_tokens"] == [len(ids)] and 1 <= len(ids) <= 12
    assert choice["idxs"] == [len(choice["acceptance_length"]) - 1]
    assert plain["choices"][0]["idxs"] == [len(ids) - 2]
    assert 0 < choice["decode_time"][0] < choice["wall_time"][0]


def test_meta_has_settings_and_provenance(finished, coco):
    meta = json.loads(finished[1].with_name(finished[1].name + ".meta.json").read_text())
    settings = meta["settings"]
    assert settings["max_new_tokens"] == 12 and settings["dtype"] == "float32" and settings["tree"] == [30, 3, 8]
    assert (settings["device_type"], settings["devices"]) == ("cpu", 1) and "1 threads" in settings["device"]
    assert len(settings["spec_model_sha256"]) == 64 and settings["draft_vocab"] is None
    assert settings["data"] == str(coco.resolve())
    assert meta["provenance"]["versions"]["torch"] and meta["left_out"] == []


def test_resume_after_a_write_cut_by_a_kill(finished, coco, tmp_path, monkeypatch):
    path = copy_of(finished[1], tmp_path)
    before = read(path)
    lines = path.read_text().splitlines(keepends=True)
    # three whole lines in another order, one of them twice, and the beginning of a fourth
    path.write_text("".join([lines[2], lines[0], lines[2], lines[1], lines[3][:40]]))
    answered = []
    measure = answerer.answer_question
    monkeypatch.setattr(answerer, "answer_question", lambda *args: answered.append(args) or measure(*args))
    run_spec(coco, tmp_path)
    assert len(answered) == 1 + 2
    after = read(path)
    assert [line["question_id"] for line in after] == sorted(IDS)
    assert [line["answer_id"] for line in after[:3]] == [line["answer_id"] for line in before[:3]]
    assert len(json.loads(path.with_name(path.name + ".meta.json").read_text())["resumed"]) == 1


def test_nothing_left_to_do_loads_no_model(finished, coco, tmp_path, monkeypatch):
    path = copy_of(finished[0], tmp_path)
    monkeypatch.setattr(answerer, "load_models", lambda *a, **k: pytest.fail("the model was loaded"))
    monkeypatch.setattr("vispec.files.tempfile.mkstemp", lambda *a, **k: pytest.fail("a file was written"))
    before = path.read_text()
    run_baseline(coco, tmp_path)
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--max-new-token", "13"], "max_new_tokens"),
        (["--dtype", "bfloat16"], "dtype"),
        (["--total-token", "20"], "asked_tree"),
        (["--tree", "auto"], "asked_tree"),
        (["--num-choices", "2"], "num_choices"),
        (["--use-ours=False", "--spec-model-path", EAGLE2], "method"),
    ],
)
def test_other_settings_are_refused(finished, coco, tmp_path, flags, name):
    path = copy_of(finished[1], tmp_path)
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match=f"made with {name} .* found "):
        run_spec(coco, tmp_path, *flags)


@pytest.mark.parametrize(
    ("name", "value"), [("device_type", "cuda"), ("devices", 2), ("draft_vocab", "9 tokens"), ("tree", [9, 3, 8])]
)
def test_what_only_loaded_models_tell_is_compared_too(finished, coco, tmp_path, name, value):
    path = copy_of(finished[1], tmp_path)
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    before = path.read_text()
    meta = path.with_name(path.name + ".meta.json")
    found = json.loads(meta.read_text())
    found["settings"][name] = value
    meta.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"made with {name} .* found "):
        run_spec(coco, tmp_path)
    assert path.read_text() == before


def test_a_retrained_head_is_refused(coco, tmp_path, monkeypatch):
    folder = tmp_path / "head"
    shutil.copytree(VISPEC, folder)
    run_spec(coco, tmp_path, "--spec-model-path", str(folder), "--question-end", "1")
    head = load_draft(str(folder))
    head.fc.bias.data += 1
    save_draft(head, folder)
    monkeypatch.setattr(answerer, "load_models", lambda *a: pytest.fail("the models were loaded"))
    with pytest.raises(ValueError, match="made with spec_model_sha256 .* found "):
        run_spec(coco, tmp_path, "--spec-model-path", str(folder), "--question-end", "1")


@pytest.mark.parametrize("tree", [["--tree", "30/3/8"], ["--total-token", "30", "--depth", "3"]])
def test_a_file_goes_on_whatever_way_its_tree_is_spelled(tree, finished, coco, tmp_path):
    path = copy_of(finished[1], tmp_path)
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    run_spec(coco, tmp_path, *tree)
    assert len(read(path)) == len(IDS)


def test_trees_that_a_rule_grows(finished, coco, tmp_path):
    """The file names the rule with all that it was, and goes on with that alone."""
    path = run_spec(coco, tmp_path, "--tree", "talon:n=12,d=3,k=4")
    settings = json.loads(path.with_name(path.name + ".meta.json").read_text())["settings"]
    assert settings["tree"] == settings["asked_tree"] == "talon:mu=0.03,n=12,d=3,k=4"
    ours, plain = ([line["choices"][0]["output_ids"] for line in read(one)] for one in (path, finished[0]))
    assert ours == plain
    with pytest.raises(ValueError, match="made with asked_tree 'talon:mu=0.03,n=12,d=3,k=4', found 'talon:mu=0.04"):
        run_spec(coco, tmp_path, "--tree", "talon:mu=0.04,n=12,d=3,k=4")
    run_spec(coco, tmp_path, "--tree", "talon:k=4,d=3,n=12,mu=0.03")


def test_trees_that_are_chosen_while_it_answers(finished, coco, tmp_path, capsys):
    path = run_spec(coco, tmp_path, "--tree", "auto", "--max-new-token", "12")
    meta = json.loads(path.with_name(path.name + ".meta.json").read_text())
    assert meta["settings"]["tree"] == meta["settings"]["asked_tree"] == "auto"
    drafted = 0
    for plain, ours in zip(read(finished[0]), read(path), strict=True):
        (one,), (other,) = plain["choices"], ours["choices"]
        assert one["output_ids"] == other["output_ids"]
        rounds, steps = other["acceptance_length"], other["idxs"][0] + 1
        # each step brings its own token and those it accepted, behind the prompt's pass; an end may cut some off
        assert len(rounds) <= steps and other["new_tokens"][0] <= 1 + steps + sum(rounds)
        drafted += len(rounds)
    capsys.readouterr()
    assert speed.main(["--baseline", str(finished[0]), "--spec", str(path)]) == 0
    assert f" over {drafted} rounds" in capsys.readouterr().out
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="made with asked_tree 'auto', found 'tune'"):
        run_spec(coco, tmp_path, "--tree", "tune")
    run_spec(coco, tmp_path, "--tree", "auto")
    assert len(read(path)) == len(IDS)


@pytest.mark.parametrize("size", ["0", "-2"])
def test_impossible_sizes_of_a_tree(size, coco, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_spec(coco, tmp_path, "--total-token", size)
    assert "--total-token: expected a whole number from 2 on, or -1 to measure" in capsys.readouterr().err


def test_a_tree_is_asked_for_in_one_way(coco, tmp_path):
    with pytest.raises(ValueError, match="^--tree and --total-token, --depth both say what the tree is, expected only"):
        run_spec(coco, tmp_path, "--tree", "9/2/2", "--total-token", "9", "--depth", "3")


def test_unreadable_images_are_left_out(coco, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(coco, data)
    (data / "val2014" / "COCO_val2014_000000000010.jpg").write_bytes(b"no picture")
    (data / "val2014" / "COCO_val2014_000000000040.jpg").unlink()
    path = run_baseline(data, tmp_path)
    assert [line["question_id"] for line in read(path)] == [20, 50, 70]
    printed = capsys.readouterr()
    assert "3 of 5 questions answered" in printed.out and "left out" in printed.err
    assert "the files of coco_caption can be had from https://" in printed.out
    meta = path.with_name(path.name + ".meta.json")
    assert {row["question_id"] for row in json.loads(meta.read_text())["left_out"]} == {10, 40}
    # a run over other questions, and one after the pictures were repaired
    run_baseline(data, tmp_path, "--question-end", "1")
    assert {row["question_id"] for row in json.loads(meta.read_text())["left_out"]} == {10, 40}
    shutil.copytree(coco, data, dirs_exist_ok=True)
    run_baseline(data, tmp_path)
    assert json.loads(meta.read_text())["left_out"] == [] and len(read(path)) == 5


def test_a_question_that_fails_ends_no_run_and_is_asked_again(coco, tmp_path, monkeypatch, capsys):
    measure = answerer.answer_question

    def fail(model, inputs, *rest):
        if inputs["image_sizes"][0, 1] == 48:
            raise RuntimeError("CUDA out of memory.\nTried to allocate 20 GiB")
        return measure(model, inputs, *rest)

    flags = ["--base-model-path", TARGET, "--data-folder", str(coco), "--answer-file", str(tmp_path / "a")]
    flags += ["--temperature", "0", "--max-new-token", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(answerer, "answer_question", fail)
        assert baseline_command.main(flags) == 3
    assert [line["question_id"] for line in read(tmp_path / "a")] == [10, 20, 40, 70]
    printed = capsys.readouterr().err
    assert "question 50 is left out: RuntimeError: CUDA out of memory. Tried to allocate 20 GiB" in printed
    assert "error: not answered, because something failed, see above: 50" in printed
    assert baseline_command.main(flags) == 0 and len(read(tmp_path / "a")) == 5


def test_an_image_that_the_processor_refuses_is_left_out(coco, tmp_path, monkeypatch, capsys):
    build = answerer.build_inputs

    def refuse(processor, turns):
        images = [item() for turn in turns for item in turn.items if not isinstance(item, str)]
        if images[0].width == 48:
            raise RefusedPrompt("absolute aspect ratio must be smaller than 200")
        return build(processor, turns)

    monkeypatch.setattr(answerer, "build_inputs", refuse)
    assert [line["question_id"] for line in read(run_baseline(coco, tmp_path))] == [10, 20, 40, 70]
    printed = capsys.readouterr()
    assert "question 50 is left out: absolute aspect ratio" in printed.err
    assert "left out, because the target's processor refuses their prompt: 50" in printed.out


def test_a_benchmark_without_any_readable_image_fails(coco, tmp_path, capsys):
    (tmp_path / "dataset_coco.json").write_text((coco / "dataset_coco.json").read_text())
    flags = ["--base-model-path", TARGET, "--data-folder", str(tmp_path), "--answer-file", str(tmp_path / "a")]
    assert baseline_command.main([*flags, "--temperature", "0", "--question-end", "2"]) == 1
    assert "error: no question has an answer" in capsys.readouterr().err


def test_prompts_beyond_the_positions_are_left_out(coco, tmp_path, capsys):
    target = tmp_path / "target"
    shutil.copytree(TARGET, target)
    config = json.loads((target / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 320
    (target / "config.json").write_text(json.dumps(config))
    path = run_baseline(coco, tmp_path, "--base-model-path", str(target))
    assert [line["question_id"] for line in read(path)] == [10, 40, 70]
    printed = capsys.readouterr().out
    assert "3 of 5 questions answered" in printed and "image cannot be read" not in printed
    assert "their prompt does not fit the target's positions: " in printed
    left_out = json.loads(path.with_name(path.name + ".meta.json").read_text())["left_out"]
    assert {row["question_id"] for row in left_out} == {20, 50}
    assert left_out[0]["reason"] == "the prompt has 327 tokens, the target has 320 positions"


@pytest.mark.parametrize("part", [["--question-begin", "5"], ["--question-begin", "3", "--question-end", "3"]])
def test_a_part_without_questions_is_refused(coco, tmp_path, part):
    with pytest.raises(ValueError, match="no question of coco_caption lies there, it has 5"):
        run_baseline(coco, tmp_path, *part)
    assert not any(tmp_path.rglob("*.jsonl"))


def test_defaults_are_the_authors():
    args = make_parser(BENCHMARKS["coco_caption"], "spec").parse_args(["--base-model-path", "a"])
    assert (args.temperature, args.max_new_token, args.num_choices) == (1.0, 1024, 1)
    assert asked_tree(args, Models.tree) == TreeShape(30, 3, 8)


def test_a_choice_is_the_same_however_many_follow(coco, tmp_path):
    flags = ["--temperature", "1.0", "--question-end", "1", "--num-choices"]
    lines = []
    for choices in ("1", "2"):
        run_baseline(coco, tmp_path / choices, *flags, choices)
        lines += read(tmp_path / choices / "coco_caption" / "tiny-plain-temperature-1.0.jsonl")
    assert lines[0]["choices"][0]["output_ids"] == lines[1]["choices"][0]["output_ids"]


def test_choices_differ_by_seed_when_sampling(coco, tmp_path):
    flags = ["--num-choices", "2", "--temperature", "1.0", "--question-begin", "1", "--question-end", "3"]
    run_baseline(coco, tmp_path, *flags)
    lines = read(tmp_path / "coco_caption" / "tiny-plain-temperature-1.0.jsonl")
    assert len(lines) == 2 and [choice["index"] for choice in lines[0]["choices"]] == [0, 1]
    assert any(line["choices"][0]["output_ids"] != line["choices"][1]["output_ids"] for line in lines)


def test_neither_flag_means_eagle2(coco, tmp_path):
    run_spec(coco, tmp_path, "--use-ours=False", "--spec-model-path", EAGLE2, "--question-end", "1")
    assert read(tmp_path / "coco_caption" / "tiny-ours-temperature-0.0.jsonl")[0]["method"] == "eagle2"


def test_medusa_answers_as_the_baseline(finished, coco, tmp_path):
    head = MedusaHead(read_config(Path(EAGLE2) / "config.json"))
    head.embed_tokens = load_draft(EAGLE2).embed_tokens
    save_draft(head, tmp_path / "medusa")
    flags = ["--use-ours=False", "--use-medusa=True", "--spec-model-path", str(tmp_path / "medusa")]
    run_spec(coco, tmp_path, *flags, "--question-end", "2")
    lines = read(tmp_path / "coco_caption" / "tiny-ours-temperature-0.0.jsonl")
    plain = {line["question_id"]: line["choices"][0]["output_ids"] for line in read(finished[0])}
    assert len(lines) == 2 and {line["method"] for line in lines} == {"medusa"}
    assert all(line["choices"][0]["output_ids"] == plain[line["question_id"]] for line in lines)


def test_lookup_answers_as_the_baseline_without_a_head(finished, coco, tmp_path):
    flags = ["--base-model-path", TARGET, "--data-folder", str(coco), "--answer-file", str(tmp_path / "a")]
    flags += ["--method", "lookup", "--temperature", "0", "--max-new-token", "12", "--question-end", "2"]
    assert spec_command.main(flags) == 0
    plain = {line["question_id"]: line["choices"][0]["output_ids"] for line in read(finished[0])}
    lines = read(tmp_path / "a")
    assert len(lines) == 2 and {line["method"] for line in lines} == {"lookup"}
    assert all(line["choices"][0]["output_ids"] == plain[line["question_id"]] for line in lines)
    settings = json.loads((tmp_path / "a.meta.json").read_text())["settings"]
    assert settings["tree"] == [30, 3, 8] and "spec_model" not in settings
    with pytest.raises(ValueError, match="--method lookup has no draft head, found --use-ours, --spec-model-path"):
        run_spec(coco, tmp_path, "--method", "lookup")
    with pytest.raises(ValueError, match="--spec-model-path is missing"):
        spec_command.main(["--base-model-path", TARGET])


def test_two_methods_are_refused_and_unused_flags_are_noticed(coco, tmp_path, capsys):
    with pytest.raises(ValueError, match="--use-ours=True and --use-medusa=True: found both"):
        run_spec(coco, tmp_path, "--use-medusa=True", "--image-fc", "--tree-choices", "mc_sim")
    with pytest.raises(ValueError, match="--method eagle3 and --use-ours=True: found both"):
        run_spec(coco, tmp_path, "--method", "eagle3")
    with pytest.raises(ValueError, match="dataset_coco.json is missing"):
        run_spec(tmp_path, tmp_path, "--image-fc", "--tree-choices", "mc_sim", "--load-in-8bit")
    assert "without effect here: --image-fc, --load-in-8bit, --tree-choices" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--max-new-token", "0"], ["--no-such"], ["--use-ours=maybe"], ["--temp", "1"]])
def test_wrong_flags_get_one_line(coco, tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        run_spec(coco, tmp_path, *flags)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
