"""The whole way on a tiny random target: text data, stage 1, image data, stage 2, a head that decodes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vispec.ge_data import (
    allocation_llava_pretrain_gen,
    allocation_llava_shargpt,
    allocation_qwen_pretrain_gen,
    allocation_qwen_shargpt,
    maker,
)
from vispec.ge_data.sample_file import read_sample
from vispec.model.drafts import build_head, load_draft
from vispec.model.drafts.checkpoints import read_config
from vispec.model.loading import load_target
from vispec.model.target import Target
from vispec.train import main, main_mtp
from vispec.train.processes import Processes
from vispec.train.target_weights import read_tables

GOLDEN = Path(__file__).parent / "golden"
LLAVA, QWEN = str(GOLDEN / "llava_next" / "target"), str(GOLDEN / "qwen2_5_vl" / "target")
CONFIG = str(GOLDEN / "llava_next" / "draft_vispec" / "config.json")
CONFIGS = Path(main.__file__).parent
QWEN_PIXELS = ["--min-pixels", "784", "--max-pixels", "7056"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few rows in the published layouts, some of them bad."""
    folder = tmp_path_factory.mktemp("data")
    text = [
        {
            "id": f"t{i}",
            "conversations": [{"from": "human", "value": "what?" * (i % 4)}, {"from": "gpt", "value": "a dog."}],
        }
        for i in range(8)
    ]
    text[2]["conversations"] = text[2]["conversations"][:1]
    (folder / "text.json").write_text(json.dumps(text))
    images = []
    for i in range(7):
        pixels = np.random.default_rng(i).integers(0, 255, (30 + 20 * (i % 3), 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nname it" + "." * i}, {"from": "gpt", "value": "unused"}]
        images.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    images[1]["image"] = "gone.png"
    images[4]["conversations"][0]["value"] = "no tag"
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(images))
    return folder


def generate_images(data, out, *more):
    arguments = ["--outdir", str(out), "--model", LLAVA, "--data-folder", str(data), "--batch-size", "3"]
    return allocation_llava_pretrain_gen.main([*arguments, "--max-new-tokens", "12", *more])


@pytest.fixture(scope="module")
def samples(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples")
    assert (
        allocation_llava_shargpt.main(["--outdir", str(out / "t"), "--model", LLAVA, "--data-folder", str(data)]) == 0
    )
    assert generate_images(data, out / "i") == 0
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_the_whole_way(samples, tmp_path):
    shared = ["--basepath", LLAVA, "--configpath", CONFIG, "--bs", "3", "--num-epochs", "2", "--lr", "1e-3"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main.main([*shared, "--tmpdir", str(samples / "t"), "--cpdir", str(one)]) == 0
    assert load_draft(one / "state_2").method == "eagle2"
    stage2 = [*shared, "--tmpdir", str(samples / "i"), str(samples / "t"), "--loadpath", str(one / "state_2")]
    stage2 += ["--mtp-steps=1", "--num-q=3", "--use-ours=True", "--cpdir", str(two)]
    assert main_mtp.main(stage2) == 0
    head = load_draft(two / "state_2", method="vispec", num_q=3)
    before = load_draft(one / "state_2")
    assert torch.equal(head.embed_tokens.weight, before.embed_tokens.weight)
    assert not torch.equal(head.fc.weight, before.fc.weight)
    lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"loss", "top1", "top3", "first5", "tau_of_chain"} <= lines[-1]["held_out"].keys()
    assert json.loads((two / "training.json").read_text())["arguments"]["mtp_steps"] == 1
    with pytest.raises(ValueError, match="--begin-epoch 1"):
        main_mtp.main([*stage2, "--begin-epoch", "1"])
    with pytest.raises(ValueError, match="--store all"):
        main_mtp.main([*stage2[:-1], str(tmp_path / "three"), "--use-ours=False"])


@torch.no_grad()
def test_samples_hold_the_target_s_features(samples):
    """A sample's features are those of one plain pass, its answer is generate()'s."""
    target = Target(load_target(LLAVA))
    sample = read_sample(samples / "t" / "00000000.safetensors")
    prompt = target.prefill(target.new_cache(1, len(sample)), sample.input_ids[None], {})
    torch.testing.assert_close(sample.hidden, prompt.hidden[0, sample.hidden_positions].detach())
    with_image = read_sample(sorted((samples / "i").glob("*.safetensors"))[0])
    assert len(with_image.images) == 1
    assert with_image.image_embeds.shape[0] == with_image.images[0][1] - with_image.images[0][0]
    assert 0 < with_image.loss_mask.sum() <= 12
    manifest = json.loads((samples / "i" / "manifest.json").read_text())
    reasons = {reason: entry["count"] for reason, entry in manifest["skipped"].items()}
    assert reasons == {"unreadable image": 1, "image tag missing": 1}
    assert manifest["samples"] == 5 and manifest["complete"]


def test_an_interrupted_run_ends_with_the_same_files(data, samples, tmp_path, monkeypatch):
    written = []

    def write(path, *rest):
        if len(written) == 2:
            path.with_name(f".{path.name}.abcd1234.unfinished").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path)
        return write_sample(path, *rest)

    write_sample = maker.write_sample
    monkeypatch.setattr(maker, "write_sample", write)
    with pytest.raises(KeyboardInterrupt):
        generate_images(data, tmp_path / "i")
    monkeypatch.undo()
    assert generate_images(data, tmp_path / "i") == 0
    assert contents(tmp_path / "i") == contents(samples / "i")
    assert not list((tmp_path / "i").glob(".*"))
    before, after = [json.loads((p / "manifest.json").read_text()) for p in (samples / "i", tmp_path / "i")]
    assert {**before, "command": 0} == {**after, "command": 0}
    with pytest.raises(ValueError, match="batch_size 3 there, 2 now"):
        generate_images(data, tmp_path / "i", "--batch-size", "2")


def test_answers_do_not_depend_on_their_batch(data, samples, tmp_path):
    assert generate_images(data, tmp_path / "one", "--batch-size", "1") == 0
    for path in (samples / "i").glob("*.safetensors"):
        a, b = read_sample(path), read_sample(tmp_path / "one" / path.name)
        assert torch.equal(a.input_ids, b.input_ids)
    sampled = ["--temperature", "1.0", "--seed", "3"]
    assert generate_images(data, tmp_path / "s3", *sampled) == 0
    assert generate_images(data, tmp_path / "s1", *sampled, "--batch-size", "1") == 0
    differ = 0
    for path in (tmp_path / "s3").glob("*.safetensors"):
        a = read_sample(path)
        assert torch.equal(a.input_ids, read_sample(tmp_path / "s1" / path.name).input_ids)
        greedy = samples / "i" / path.name
        differ += not greedy.is_file() or not torch.equal(a.input_ids, read_sample(greedy).input_ids)
    assert differ >= 3


def test_qwen_data(data, tmp_path):
    shared = ["--model", QWEN, "--data-folder", str(data)]
    assert allocation_qwen_shargpt.main(["--outdir", str(tmp_path / "t"), *shared]) == 0
    image = ["--max-new-tokens", "6", "--end", "2", *QWEN_PIXELS]
    assert allocation_qwen_pretrain_gen.main(["--outdir", str(tmp_path / "i"), *shared, *image]) == 0
    text = read_sample(sorted((tmp_path / "t").glob("*.safetensors"))[0])
    assert text.loss_mask.any() and not text.images
    for path in (tmp_path / "i").glob("*.safetensors"):
        sample = read_sample(path)
        assert len(sample.images) == 1
        assert sample.image_embeds.shape[0] == sample.images[0][1] - sample.images[0][0]


def test_tables_of_the_target(tmp_path):
    for path in (LLAVA, QWEN):
        target = Target(load_target(path))
        embedding, lm_head = read_tables(path)
        assert torch.equal(embedding, target.embed_tokens.weight)
        assert torch.equal(lm_head, target.lm_head.weight)
    # sharded, tied, with transformers 5's names
    save_file({"model.language_model.embed_tokens.weight": embedding}, tmp_path / "model-1.safetensors")
    weight_map = {"model.language_model.embed_tokens.weight": "model-1.safetensors", "other": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    with pytest.raises(ValueError, match="lm_head"):
        read_tables(tmp_path)
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    assert torch.equal(read_tables(tmp_path)[1], embedding)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("llava_1.6_7B_config.json", "llava-hf/llava-v1.6-vicuna-7b-hf"),
        ("llava_1.5_7B_config.json", "llava-hf/llava-v1.6-vicuna-7b-hf"),
        ("llava_1.6_13B_config.json", "llava-hf/llava-v1.6-vicuna-13b-hf"),
        ("qwen2.5_vl_3B_config.json", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("qwen2.5_vl_7B_config.json", "Qwen/Qwen2.5-VL-7B-Instruct"),
    ],
)
def test_published_configs_build_heads(file, name):
    shapes = json.loads((GOLDEN / "published_draft_shapes.json").read_text())
    entry = next(value for key, value in shapes.items() if name.split("/")[1].lower() in key.lower())
    entry = entry.get("tensors", entry)
    head = build_head(read_config(CONFIGS / file), "vispec", num_q=2)
    assert {key: list(value.shape) for key, value in head.state_dict().items()} == entry


def test_a_run_goes_on_with_its_own_target_and_precision_only(samples, tmp_path, monkeypatch):
    target = shutil.copytree(LLAVA, tmp_path / "target")
    arguments = ["--basepath", str(target), "--configpath", CONFIG, "--tmpdir", str(samples / "t")]
    arguments += ["--cpdir", str(tmp_path / "cp"), "--num-epochs", "1", "--bs", "8"]
    assert main.main(arguments) == 0
    tensors = load_file(target / "model.safetensors")
    (head,) = [name for name in tensors if name.endswith("lm_head.weight")]
    tensors[head][3, 5] += 1
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="cp holds a run of other arguments .target_tables '.*' there, '.*' now"):
        main.main(arguments)
    arguments[1] = LLAVA
    assert main.main(arguments) == 0
    config = json.loads(Path(CONFIG).read_text()) | {"rope_theta": 5e5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: rope_theta is 500000.0, the draft head's 10000.0"):
        main.main([str(tmp_path / "config.json") if argument == CONFIG else argument for argument in arguments])
    bf16 = Processes(torch.device("cpu"), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr("vispec.train.command.launched_processes", lambda: bf16)
    with pytest.raises(ValueError, match="mixed_precision 'no' there, 'bf16' now"):
        main.main(arguments)
    arguments[arguments.index("--cpdir") + 1] = str(tmp_path / "bf16")
    assert main.main(arguments) == 0
    losses = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["train"]["loss"]
        for name in ("cp", "bf16")
    ]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)
    assert load_file(tmp_path / "bf16" / "state_1" / "model.safetensors")["fc.weight"].dtype == torch.float32


def test_refusals_name_the_flag(samples, tmp_path):
    shared = ["--configpath", CONFIG, "--cpdir", str(tmp_path / "c"), "--tmpdir"]
    for arguments, message in (
        (["--basepath", LLAVA, *shared, str(tmp_path / "none")], "--tmpdir .*none"),
        (["--basepath", QWEN, *shared, str(samples / "t")], "--basepath .*its embedding is"),
        (["--basepath", str(tmp_path), *shared, str(samples / "t")], "model.safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            main.main(arguments)
    assert load_file(GOLDEN / "training.safetensors")
