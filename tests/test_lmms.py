"""The model of lmms-eval, in the real package: its answers are those of `SpecModel` alone.

`make test-lmms` installs the package; elsewhere these tests are skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make test-lmms")

from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from lmms_eval.models.model_utils.gen_metrics import get_logged_metrics_history
from PIL import Image

from vispec import SpecModel, embedded
from vispec.evaluation.lmms import ViSpec
from vispec.prompts import build_inputs, image_file, load_processor, user_turn

NEW = 24
TARGET = str(embedded.TARGET)
TASK = """
task: scenes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function scenes.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function scenes.process_results
generation_kwargs: {{max_new_tokens: {new}, temperature: 0, do_sample: false, image_aspect_ratio: pad}}
metric_list: [{{metric: same, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 1.0}}]
"""
SCENES = """
from PIL import Image

def pictures(doc):
    return [Image.open(doc["image"])]

def process_results(doc, results):
    return {"same": float(results[0] == doc["answer"].strip())}
"""


@pytest.fixture(scope="module")
def alone() -> list[dict]:
    """Questions about scenes, with what `SpecModel` alone answers."""
    model, processor = SpecModel.from_pretrained(TARGET, str(embedded.DRAFT), dtype="float32"), load_processor(TARGET)
    docs = []
    for picture, question in embedded.questions()[:4]:
        inputs = build_inputs(processor, [user_turn(image_file(picture), question)], system="")
        found = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answer = processor.tokenizer.decode(found, skip_special_tokens=True)
        docs.append({"image": str(picture), "question": question, "answer": answer, "tokens": len(found)})
    return docs


@pytest.fixture(scope="module")
def drafting() -> ViSpec:
    return ViSpec(batch_size=3)


def ask(model: ViSpec, conversations: list[list], **gen_kwargs) -> list:
    """What a model answers to chat messages, as lmms-eval asks it."""
    model.task_dict = {"talk": {"test": conversations}}
    gen_kwargs = {"max_new_tokens": NEW, "until": ["\n\n"], **gen_kwargs}
    requests = []
    for i in range(len(conversations)):
        metadata = {"task": "talk", "doc_id": i, "repeats": 1}
        arguments = ("", lambda doc: doc, gen_kwargs, i, "talk", "test")
        requests.append(Instance("generate_until", arguments, 0, metadata))
    return model.generate_until(requests)


def message(*items, role: str = "user") -> dict:
    """A chat message of texts, and of pictures or their files."""
    content = []
    for item in items:
        shown = str(item) if isinstance(item, Path) else item
        content.append({"type": "text", "text": item} if isinstance(item, str) else {"type": "image", "url": shown})
    return {"role": role, "content": content}


def conversations(docs: list[dict]) -> list[list]:
    return [[message(Image.open(doc["image"]), doc["question"])] for doc in docs]


# --- the command ---


def test_the_command_scores_the_answers_of_the_model_alone(alone, tmp_path):
    data = tmp_path / "scenes.json"
    data.write_text("\n".join(map(json.dumps, alone)))
    (tmp_path / "scenes.yaml").write_text(TASK.format(data=data, new=NEW))
    (tmp_path / "scenes.py").write_text(SCENES)
    command = ["-m", "lmms_eval", "--model", "vispec", "--model_args", "tree=12/4/2", "--tasks", "scenes"]
    command += ["--include_path", tmp_path, "--batch_size", "3", "--log_samples", "--output_path", tmp_path / "out"]
    homes = {name: str(tmp_path / name) for name in ("HF_HOME", "LMMS_EVAL_HOME")}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=os.environ | homes, cwd=tmp_path, capture_output=True, text=True
    )
    assert "|scenes|" in done.stdout, done.stdout + done.stderr
    assert "image_aspect_ratio='pad' is not applied" in done.stdout
    found = json.loads(next((tmp_path / "out").rglob("*_results.json")).read_text())
    assert found["results"]["scenes"]["same,none"] == 1.0
    speed = found["throughput"]
    assert speed["total_gen_tokens"] == sum(doc["tokens"] for doc in alone)
    assert speed["avg_speed"] > 0 and speed["avg_tau"] > 1
    samples = next((tmp_path / "out").rglob("*_samples_scenes.jsonl")).read_text().splitlines()
    told = {sample["doc_id"]: sample["token_counts"][0] for sample in map(json.loads, samples)}
    assert [told[i]["output_tokens"] for i in range(len(alone))] == [doc["tokens"] for doc in alone]


# --- what is asked ---


def test_rows_of_all_kinds_are_answered_as_they_are_alone(alone, drafting):
    """Batches of three have texts alone, several pictures, and turns of all roles beside each other."""
    picture, file = Image.open(alone[0]["image"]), Path(alone[1]["image"])
    asked = [
        *conversations(alone[:2]),
        [message("What is a circle?")],
        [message("Be brief.", role="system"), message(file, "Which colours are there?")],
        [message(picture, file, "Compare the scenes.")],
        [message(picture, "Describe it."), message("It is red.", role="assistant"), message("And what else?")],
    ]
    together = ask(drafting, asked)
    assert [answer.text for answer in together[:2]] == [doc["answer"] for doc in alone[:2]]
    assert [ask(drafting, [messages]) for messages in asked[2:]] == [[answer] for answer in together[2:]]
    assert ask(ViSpec(TARGET, dtype="float32", batch_size=6), asked) == together, "without a draft"
    history = get_logged_metrics_history()
    assert "tau" in history[-2] and "tau" not in history[-1]


def test_an_answer_ends_before_a_stop_string(alone, drafting):
    stops = ["object", alone[1]["answer"].split()[3]]
    cut = [min((doc["answer"].partition(stop)[0] for stop in stops), key=len) for doc in alone[:2]]
    found = ask(drafting, conversations(alone[:2]), until=stops)
    assert [answer.text for answer in found] == cut != [doc["answer"] for doc in alone[:2]]
    assert all(answer.token_counts.output_tokens < NEW for answer in found)
    once = ask(drafting, conversations(alone[:1]), until="object")
    assert once[0].text == alone[0]["answer"].partition("object")[0]


def test_a_seed_samples_one_answer_whatever_else_is_asked(alone, drafting):
    options = {"temperature": 2.0, "seed": 3, "max_new_tokens": 12}
    docs = conversations(alone[:2])
    together = ask(drafting, docs, **options)
    assert together == [ask(drafting, [messages], **options)[0] for messages in docs]
    greedy = ask(drafting, docs, max_new_tokens=12)
    assert together != greedy
    assert ask(drafting, docs, temperature=2.0, do_sample=False, max_new_tokens=12) == greedy
    assert ask(drafting, docs, temperature=0, do_sample=True, max_new_tokens=12) == greedy


# --- what is wrong ---


def test_what_cannot_be_read_has_an_empty_answer(alone, drafting, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    asked = [
        [message(broken, "What is this?")],
        [message("What is <image>?")],
        [message("word " * drafting._model.target.max_positions)],
        *conversations(alone[:1]),
    ]
    found = ask(drafting, asked)
    assert [answer.text for answer in found] == ["", "", "", alone[0]["answer"]]
    assert [answer.token_counts is None for answer in found] == [True, True, True, False]


@pytest.mark.parametrize(
    "content",
    [
        {"type": "audio", "url": "sound.wav"},
        {"type": "video", "url": "video.mp4", "start_time": 1.0},
        {"type": "image", "url": {"bytes": b""}},
    ],
)
def test_what_is_no_picture_is_refused(drafting, content):
    with pytest.raises(ValueError, match=f"found .*{content['type']}"):
        ask(drafting, [[{"role": "user", "content": [content]}]])


@pytest.mark.parametrize(
    "gen_kwargs", [{"num_beams": 2}, {"num_return_sequences": 2}, {"max_new_token": 3}, {"top_p": "high"}]
)
def test_a_wrong_option_is_named(alone, drafting, gen_kwargs):
    with pytest.raises((TypeError, ValueError), match=next(iter(gen_kwargs))):
        ask(drafting, conversations(alone[:1]), **{"do_sample": True, **gen_kwargs})


@pytest.mark.parametrize(
    "arguments, error",
    [
        ("spec=HEAD", "spec HEAD needs base"),
        ("bsae=TARGET", "bsae"),
        ("batch_size=auto", "batch_size"),
        ("batch_size=0", "batch_size"),
        ("dtype=float8", "dtype 'float8'"),
        ("device_map=cpu,device=cpu", "device_map cpu and --device cpu"),
        ("max_num_frames=0", "max_num_frames"),
        ("max_pixels=50176", "max_pixels: the LlavaNextImageProcessor"),
        ("tree=30/3", "30/3"),
        ("method=eagle9", "eagle9"),
    ],
)
def test_a_wrong_argument_is_named(arguments, error):
    with pytest.raises((TypeError, ValueError), match=error):
        ViSpec.create_from_arg_string(arguments)


def test_other_ways_of_asking_are_refused_by_name(drafting):
    assert get_model("vispec") is ViSpec
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match=name):
            getattr(drafting, name)([])
