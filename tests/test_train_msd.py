"""Training of MSD's head repeats the recorded outputs, losses and gradients, and follows its schedule."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vispec.model.drafts import load_draft
from vispec.train.losses import PARTS, summed_loss
from vispec.train.msd import OBJECTIVE

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
    loss, parts = summed_loss(OBJECTIVE, rows[:, None], targets, recorded["head_weight"])
    found = dict(zip(PARTS, (parts / len(scored)).tolist(), strict=True))
    assert found["feature"] == pytest.approx(recorded["vloss"].item(), rel=1e-5)
    assert found["token"] == pytest.approx(recorded["ploss"].item(), rel=1e-5)
    assert found["loss"] == pytest.approx(recorded["loss"].item(), rel=1e-5)

    (loss / len(scored)).backward()
    prefix = "grad_norm."
    expected = {name[len(prefix) :]: value.item() for name, value in recorded.items() if name.startswith(prefix)}
    gradients = {name: p.grad.norm().item() for name, p in head.named_parameters() if p.grad is not None}
    assert gradients == pytest.approx(expected, rel=1e-3)
