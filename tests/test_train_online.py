"""Features that the target computes while the head is trained lead to the weights that stored ones lead to."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_rows import CONFIGS, TARGETS, generate, write_rows

from vispec.ge_data.sample_file import read_note, read_tokens
from vispec.train import main, main_mtp
from vispec.train.online import Pictures

STEPS = ["--num-epochs", "4", "--save-every", "4", "--lr", "1e-3"]  # of five training samples each


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """Folders `<stage>_<store>` of LLaVA samples."""
    out = tmp_path_factory.mktemp("samples")
    for stage, store in (("text", "pairs"), ("text", "tokens"), ("image", "pairs"), ("image", "tokens")):
        assert generate(stage, "llava", data, out / f"{stage}_{store}", "--store", store) == 0
    return out


def trained(stage, folders, cpdir, *more, family="llava"):
    """Weights after 20 steps."""
    run = main.main if stage == 1 else main_mtp.main
    shared = ["--basepath", TARGETS[family], "--configpath", CONFIGS[family], *STEPS]
    assert run([*shared, "--tmpdir", *map(str, folders), "--cpdir", str(cpdir), *more]) == 0
    return load_file(cpdir / "state_4" / "model.safetensors")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("noise", ["0", "0.2"])
def test_same_weights_as_from_stored_features(made, tmp_path, stage, noise):
    kind = "text" if stage == 1 else "image"
    stored = trained(stage, [made / f"{kind}_pairs"], tmp_path / "stored", "--noise", noise)
    online = trained(stage, [made / f"{kind}_tokens"], tmp_path / "online", "--noise", noise, "--online")
    assert_same(online, stored)
    steps = json.loads((tmp_path / "online" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert steps == 20
    other = trained(stage, [made / f"{kind}_tokens"], tmp_path / "other", "--noise", "0.4", "--online")
    assert any((other[name] - stored[name]).abs().max() > 1e-4 for name in stored)


def test_stored_features_do_not_matter_online(made, tmp_path):
    """Samples of any --store, cut to --max-len, in padded batches read by other processes."""
    settings = ["--bs", "2", "--max-len", "300", "--num-workers", "1"]
    folders = [made / "image_pairs", made / "text_pairs"]
    stored = trained(2, folders, tmp_path / "stored", *settings)
    assert_same(trained(2, folders, tmp_path / "online", *settings, "--online=True"), stored)


def test_eagle2_on_images_online(data, made, tmp_path):
    assert generate("image", "llava", data, tmp_path / "all", "--store", "all") == 0
    stored = trained(2, [tmp_path / "all"], tmp_path / "stored", "--use-ours=False")
    online = trained(2, [made / "image_tokens"], tmp_path / "online", "--use-ours=False", "--online")
    assert_same(online, stored)


def test_qwen_online_uses_the_data_s_pixel_limits(data, tmp_path):
    for store in ("pairs", "tokens"):
        assert generate("image", "qwen", data, tmp_path / store, "--store", store) == 0
    stored = trained(2, [tmp_path / "pairs"], tmp_path / "stored", family="qwen")
    assert_same(trained(2, [tmp_path / "tokens"], tmp_path / "online", "--online", family="qwen"), stored)


def test_the_plan_counts_the_target_s_memory(made, tmp_path, capsys):
    arguments = ["--basepath", TARGETS["llava"], "--configpath", CONFIGS["llava"], "--cpdir", str(tmp_path / "cp")]
    arguments += ["--tmpdir", str(made / "image_tokens"), "--dry-run"]
    assert main_mtp.main([*arguments, "--online", "--target-dtype", "bfloat16"]) == 0
    weights = load_file(f"{TARGETS['llava']}/model.safetensors").values()
    count = sum(tensor.numel() for tensor in weights)
    plan = capsys.readouterr().out
    size = float(re.search(rf"([\d.]+) MiB  the target of --online: {count:,} parameters\n", plan)[1])
    assert size == pytest.approx(2 * count / 2**20, abs=0.05)


def test_the_plan_counts_what_training_cuts(made, tmp_path, capsys):
    """The same numbers from ids as from stored features."""
    plans = []
    for store, more in (("tokens", ["--online"]), ("pairs", [])):
        arguments = ["--basepath", TARGETS["llava"], "--configpath", CONFIGS["llava"], "--cpdir", str(tmp_path / "cp")]
        arguments += ["--tmpdir", str(made / f"image_{store}"), "--max-len", "240", "--dry-run", *more]
        assert main_mtp.main(arguments) == 0
        plan = capsys.readouterr().out
        plans.append([line for line in plan.splitlines() if line.startswith(("tokens", "images", "scored", "cut"))])
        plans[-1].append(plan.split("⟦")[1])
    assert plans[0] == plans[1]
    assert re.search(r"cut +[1-6] of all samples by \d+ tokens", plans[0][3])


def test_token_files_are_small_and_complete(made):
    for stage in ("text", "image"):
        for path in (made / f"{stage}_tokens").glob("*.safetensors"):
            tokens, full = read_tokens(path), read_tokens(made / f"{stage}_pairs" / path.name)
            assert path.stat().st_size < 600 + 5 * len(tokens)
            assert torch.equal(tokens.input_ids, full.input_ids)
            assert torch.equal(tokens.loss_mask, full.loss_mask)
            assert tokens.images == full.images and len(tokens.images) == (stage == "image")
            assert tokens.picture == full.picture == (f"{read_note(path)['id']}.png" if stage == "image" else None)


def test_tokens_without_online_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match=r"\d.safetensors: .*--store tokens.*--online.*--store pairs"):
        trained(2, [made / "image_tokens"], tmp_path / "cp")
    with pytest.raises(ValueError, match="--data-folder .*--online"):
        trained(2, [made / "image_pairs"], tmp_path / "cp", "--data-folder", str(tmp_path))


def test_images_that_moved(data, made, tmp_path):
    """A missing image names sample and file; --data-folder says where the images are now."""
    moved = shutil.copytree(data, tmp_path / "moved")
    folder = shutil.copytree(made / "image_tokens", tmp_path / "tokens")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["arguments"]["data_folder"] = str(tmp_path / "gone")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"tokens/\d+.safetensors: its image .*gone/\d.png .*no such file.*--data-fol"):
        trained(2, [folder], tmp_path / "one", "--online")
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="tokens: no manifest.json .*--data-folder"):
        trained(2, [folder], tmp_path / "two", "--online")
    found = trained(2, [folder], tmp_path / "three", "--online", "--data-folder", str(moved))
    assert_same(found, trained(2, [made / "image_tokens"], tmp_path / "four", "--online"))
    for path in moved.glob("*.png"):
        path.write_bytes(b"no picture")
    # in a process that reads for the training one as well
    with pytest.raises(ValueError, match=r"^\S*\d+.safetensors: its image .*moved/\d.png cannot be read"):
        trained(2, [folder], tmp_path / "five", "--online", "--data-folder", str(moved), "--num-workers", "1")


def test_images_outside_of_the_folder(made, tmp_path):
    """The notes of samples are data too."""
    folder = made / "image_tokens"
    path = sorted(folder.glob("*.safetensors"))[0]
    tokens = replace(read_tokens(path), picture="../0.png")
    with pytest.raises(ValueError, match=r"its image ../0.png is outside of the data folder .*--allow-outside"):
        Pictures(TARGETS["llava"], [folder]).inputs(tokens)
    with pytest.raises(ValueError, match=r"/\.\./0.png cannot be read"):
        Pictures(TARGETS["llava"], [folder], str(tmp_path / "none"), allow_outside=True).inputs(tokens)


def test_another_target_s_images_are_refused(data, tmp_path):
    """The same pictures under other pixel limits have other token counts."""
    assert generate("image", "qwen", data, tmp_path / "tokens", "--store", "tokens") == 0
    path = tmp_path / "tokens" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["arguments"]["max_pixels"] = 784
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"\d+.safetensors: .*image tokens"):
        trained(2, [tmp_path / "tokens"], tmp_path / "cp", "--online", family="qwen")
