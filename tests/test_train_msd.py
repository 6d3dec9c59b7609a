"""Training of MSD's head repeats the recorded outputs, losses and gradients, and follows its schedule."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import generate as generate_by_target
from tiny_models import image_prompt
from tiny_rows import CONFIGS, TARGETS, generate, write_rows

from vispec import SpecModel
from vispec.model.drafts import load_draft
from vispec.train import main_msd, msd
from vispec.train.losses import PARTS, Objective, summed_loss
from vispec.train.msd import EPOCHS, image_share, shown

GOLDEN = Path(__file__).parent / "golden" / "msd"


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_outputs_losses_and_gradients(family):
    """The recording scores pairs two tokens late, and embeds token 0 behind the last one."""
    recorded = load_file(GOLDEN / family / "training.safetensors")
    head = load_draft(str(GOLDEN / family / "draft"), "msd").train()
    lengths = recorded["batch.attention_mask"].sum(1).tolist()
    image = recorded["sample0.image_mask"][0].nonzero()[:, 0].tolist()
    images = [[(image[0], image[-1] + 1)], []]
    layout = head.plan(lengths, images)
    assert torch.equal(layout.compressed >= 0, recorded["batch.pair_is_image"])
    embeds = recorded["batch.inputs_embeds"]
    out = head(recorded["batch.hidden_states"], embeds, embeds, images, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(out[row, :length], recorded["predict"][row, :length], rtol=1e-4, atol=1e-5)

    scored = recorded["batch.loss_mask"].flatten().nonzero()[:, 0]
    rows, targets = (x.flatten(0, 1)[scored] for x in (out, recorded["batch.target"]))
    loss, parts = summed_loss(Objective.eagle(), rows[:, None], targets, recorded["head_weight"])
    found = dict(zip(PARTS, (parts / len(scored)).tolist(), strict=True))
    assert found["feature"] == pytest.approx(recorded["vloss"].item(), rel=1e-5)
    assert found["token"] == pytest.approx(recorded["ploss"].item(), rel=1e-5)
    assert found["loss"] == pytest.approx(recorded["loss"].item(), rel=1e-5)

    (loss / len(scored)).backward()
    prefix = "grad_norm."
    expected = {name[len(prefix) :]: value.item() for name, value in recorded.items() if name.startswith(prefix)}
    gradients = {name: p.grad.norm().item() for name, p in head.named_parameters() if p.grad is not None}
    assert gradients == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_recorded_schedule(family):
    recorded = json.loads((GOLDEN / family / "trace.json").read_text())["training"]["multimodal_share_by_epoch"]
    assert [image_share(epoch, EPOCHS) for epoch in range(EPOCHS)] == pytest.approx(recorded)


def test_samples_of_an_epoch():
    text, images = list(range(100)), list(range(1000, 1060))
    assert shown(text, images, 0.0, 0, 3) == text[:60] and shown(text, images, 1.0, 0, 3) == images
    some = shown(text, images, 0.5, 0, 3)
    assert all(one in (text[place], images[place]) for place, one in enumerate(some))
    assert 15 < sum(map(text.count, some)) < 45
    assert some == shown(text, images, 0.5, 0, 3) and some != shown(text, images, 0.5, 0, 4)
    assert shown(text, [], 0.0, 0, 0) == text and shown([], images, 0.0, 0, 0) == images


def test_a_trained_head_decodes(tmp_path, monkeypatch):
    data = write_rows(tmp_path / "data")
    for stage in ("text", "image"):
        assert generate(stage, "llava", data, tmp_path / stage) == 0
    seen = []
    batch_loss = msd.MSDTrainer.loss

    def noted(self, batch):
        if torch.is_grad_enabled():
            seen.append((self.epoch, *map(bool, batch.images)))
        return batch_loss(self, batch)

    monkeypatch.setattr(msd.MSDTrainer, "loss", noted)
    shared = ["--basepath", TARGETS["llava"], "--configpath", CONFIGS["llava"], "--num-epochs", "4", "--lr", "1e-3"]
    folders = ["--tmpdir", str(tmp_path / "text"), str(tmp_path / "image"), "--cpdir", str(tmp_path / "cp")]
    assert main_msd.main([*shared, *folders, "--bs", "2"]) == 0
    kinds = {epoch: {kind for done, *kinds in seen if done == epoch for kind in kinds} for epoch in range(4)}
    assert kinds[0] == kinds[1] == {False} and kinds[3] == {True}
    lines = (tmp_path / "cp" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and all(json.loads(line)["step"] % 3 == 0 for line in lines), "five of each kind, two a step"
    model = SpecModel.from_pretrained(TARGETS["llava"], str(tmp_path / "cp" / "state_4"), tree="12/3/4")
    assert model.draft.method == "msd"
    inputs = image_prompt(model.target.model, 1, ".a.")
    answer = model.specgenerate(**inputs, max_new_tokens=12)
    assert answer.tolist() == generate_by_target(model.target.model, inputs, max_new_tokens=12).tolist()
    capped = [*shared[:4], "--num-epochs", "1", "--tmpdir", str(tmp_path / "image")]
    head = str(GOLDEN.parent / "llava_next" / "draft_eagle2")
    assert main_msd.main([*capped, "--cpdir", str(tmp_path / "further"), "--loadpath", head]) == 0
    assert load_draft(str(tmp_path / "further" / "state_1")).method == "msd"
