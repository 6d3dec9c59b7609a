"""Training repeats the recorded outputs, losses and gradients."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vispec.model.drafts import load_draft
from vispec.train.chain import draft_chain
from vispec.train.losses import PARTS, Objective, summed_loss

GOLDEN = Path(__file__).parent / "golden"

CASES = {
    "stage1": ("draft_eagle2", Objective.stage1(), 0, ["stage1_draft_out"]),
    "stage2": ("draft_vispec", Objective.stage2(), 1, ["draft_out", "draft_out_mtp1"]),
}


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN / "training.safetensors")


@pytest.mark.parametrize("stage", CASES)
@pytest.mark.parametrize("chunk", [None, 5])
def test_outputs_losses_and_gradients(recorded, stage, chunk):
    folder, objective, steps, names = CASES[stage]
    head = load_draft(GOLDEN / "llava_next" / folder).train()
    image = recorded["image_mask"][0].nonzero()[:, 0]
    spans = [[(int(image[0]), int(image[-1]) + 1)]]
    hidden = recorded["hidden_states"]

    outs = draft_chain(head, hidden, recorded["inputs_embeds"], spans, [hidden.shape[1]], steps)
    for out, name in zip(outs, names, strict=True):
        torch.testing.assert_close(out, recorded[name], rtol=1e-4, atol=1e-5)

    scored = recorded["loss_mask"][0].nonzero()[:, 0]
    targets = torch.cat([hidden[0, 1:], torch.zeros_like(hidden[0, :1])])[scored]
    rows = torch.stack([out[0, scored] for out in outs], dim=1)
    loss, parts = summed_loss(objective, rows, targets, recorded["head_weight"], chunk)
    count = len(scored) * (steps + 1)
    assert loss.item() / count == pytest.approx(recorded[f"{stage}_loss"].item(), rel=1e-4)
    if stage == "stage1":
        part = dict(zip(PARTS, (parts / count).tolist(), strict=True))
        assert part["feature"] == pytest.approx(recorded["stage1_vloss"].item(), rel=1e-4)
        tokens = part["token"] + 0.1 * part["ranking"]
        assert tokens == pytest.approx(recorded["stage1_ploss"].item(), rel=1e-4)

    (loss / count).backward()
    prefix = f"{stage}_grad_norm."
    expected = {name[len(prefix) :]: value.item() for name, value in recorded.items() if name.startswith(prefix)}
    found = {name: p.grad.norm().item() for name, p in head.named_parameters() if p.grad is not None}
    assert found == pytest.approx(expected, rel=1e-3)


def test_hits_count_the_target_s_choice():
    """top1 … top3 are the shares of rows where the target's best token is among the draft's best."""
    head = torch.eye(4)
    targets = torch.tensor([[0.0, 9.0, 0.0, 0.0]] * 3)
    outs = torch.tensor([[1.0, 4.0, 3.0, 2.0], [4.0, 3.0, 2.0, 1.0], [4.0, 2.0, 3.0, 1.0]])[:, None]
    _, parts = summed_loss(Objective.stage2(), outs, targets, head)
    hits = dict(zip(PARTS, parts.tolist(), strict=True))
    assert [hits[f"top{k}"] for k in (1, 2, 3)] == [1, 2, 3]


def test_cross_entropy_is_the_paper_s_alone():
    targets, outs = torch.randn(5, 4), torch.randn(5, 1, 4)
    head = torch.randn(7, 4)
    loss, _ = summed_loss(Objective.stage2("ce"), outs, targets, head)
    expected = torch.nn.functional.cross_entropy(outs[:, 0] @ head.T, (targets @ head.T).softmax(-1), reduction="sum")
    torch.testing.assert_close(loss, expected)
