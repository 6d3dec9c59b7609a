"""Training of EAGLE-3's head repeats the recorded losses and gradients."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vispec.model.drafts import load_draft
from vispec.train import eagle3
from vispec.train.chain import drafted_in_a_row
from vispec.train.eagle3 import DECAY, STEPS, token_loss

GOLDEN = Path(__file__).parent / "golden" / "eagle3"


@pytest.fixture
def recorded():
    tensors = load_file(GOLDEN / "training.safetensors")
    return tensors | {"table": load_file(GOLDEN / "target" / "model.safetensors")["model.embed_tokens.weight"]}


@pytest.mark.parametrize("rows", [1000, 4])
def test_outputs_losses_and_gradients(recorded, rows, monkeypatch):
    """The recording scores pair i by token i, the last one included, after which it sees token 0 and no target."""
    monkeypatch.setattr(eagle3, "chunk_rows", lambda *sizes: rows)
    head = load_draft(str(GOLDEN / "draft"), embedding=recorded["table"]).train()
    ids, mask = recorded["input_ids"], recorded["loss_mask"].bool()
    assert recorded["attention_mask"][:, 0].all(), "padding is behind"
    lengths = (recorded["attention_mask"].sum(1) + 1).tolist()
    features = F.pad(recorded["target_aux_hidden"], (0, 0, 0, 1))
    embeds = recorded["table"][F.pad(ids, (0, 1))]
    outs = list(drafted_in_a_row(head, head.project(features), embeds, [[], []], lengths, STEPS))
    for step in (0, 1, 6):
        # the recording keeps a draft's outputs at the pair that it began with
        ours, theirs = outs[step][:, step:-1], recorded[f"step{step}.out_hidden"][:, : ids.shape[1] - step]
        for row, length in enumerate(lengths):
            within = slice(0, length - 1 - step)
            torch.testing.assert_close(ours[row, within], theirs[row, within], rtol=1e-4, atol=1e-5)
            if step != 1:
                logits = recorded[f"step{step}.logits"][row, within]
                torch.testing.assert_close(head.logits(ours[row, within]), logits, rtol=1e-4, atol=1e-4)

    scored = F.pad(mask, (0, 1)).flatten().nonzero()[:, 0]
    teacher = F.pad(recorded["target_logits"][:, 1:], (0, 0, 0, 2)).flatten(0, 1)[scored]
    found = torch.stack([out.flatten(0, 1)[scored] for out in outs], dim=1)
    reached = scored[:, None] % embeds.shape[1] >= torch.arange(STEPS)
    loss, parts = token_loss(head, found, teacher, torch.eye(teacher.shape[1]), reached)
    assert loss.item() / ids.numel() == pytest.approx(recorded["loss"].item(), rel=1e-5)
    steps = sum(recorded["plosses"].tolist())
    assert parts[2].item() / ids.numel() == pytest.approx(steps, rel=1e-5)
    weighted = sum(DECAY**step * one for step, one in enumerate(recorded["plosses"].tolist()))
    assert recorded["loss"].item() == pytest.approx(weighted, rel=1e-5)
    assert parts[4].item() / len(scored) == pytest.approx(recorded["accuracies"][0].item())

    (loss / ids.numel()).backward()
    prefix = "grad_norm."
    expected = {name[len(prefix) :]: value.item() for name, value in recorded.items() if name.startswith(prefix)}
    gradients = {name: p.grad.norm().item() for name, p in head.named_parameters() if p.grad is not None}
    assert gradients == pytest.approx(expected, rel=1e-3)
