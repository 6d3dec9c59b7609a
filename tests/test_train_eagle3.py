"""Training of EAGLE-3's head repeats the recorded losses and gradients; heads that it makes decode."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import generate as generate_by_target
from tiny_models import image_prompt
from tiny_rows import CONFIGS, TARGETS, generate, write_rows

from vispec import SpecModel
from vispec.ge_data.sample_file import read_sample
from vispec.model.drafts import load_draft
from vispec.model.drafts.formats import AUX_LAYERS
from vispec.train import draft_vocab, eagle3, main, main_eagle3
from vispec.train.chain import drafted_in_a_row
from vispec.train.draft_vocab import count_answers
from vispec.train.eagle3 import DECAY, STEPS, token_loss
from vispec.train.plan import memory_estimate
from vispec.train.samples import collate, find_samples, hold_out

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


# --- the command ---


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folders of samples: features of three layers, and token ids alone."""
    out = tmp_path_factory.mktemp("samples")
    data = write_rows(out / "data")
    stored = ["--store", "eagle3", "--aux-layers", "2", "0", "1"]
    for stage in ("text", "image"):
        assert generate(stage, "llava", data, out / f"{stage}_eagle3", *stored) == 0
        assert generate(stage, "llava", data, out / f"{stage}_tokens", "--store", "tokens") == 0
    return out


@pytest.fixture
def config(tmp_path) -> Path:
    """Of a head that reads the inputs of all three layers and proposes 20 tokens."""
    values = json.loads(Path(CONFIGS["llava"]).read_text())
    values |= {"draft_vocab_size": 20, "eagle_config": {AUX_LAYERS: [-1, 0, 1]}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


def flags(config: Path, cpdir: Path, *folders: Path, epochs: int = 4, steps: int = 3) -> list[str]:
    shared = ["--basepath", TARGETS["llava"], "--configpath", str(config), "--cpdir", str(cpdir)]
    shared += ["--num-epochs", str(epochs), "--save-every", str(epochs), "--ttt-length", str(steps), "--lr", "1e-2"]
    return [*shared, "--tmpdir", *map(str, folders)]


def test_same_weights_from_stored_and_from_online_features(made, config, tmp_path):
    weights = []
    for name, more in (("eagle3", ()), ("tokens", ("--online",))):
        asked = flags(config, tmp_path / name, made / f"text_{name}", made / f"image_{name}", epochs=1)
        assert main_eagle3.main([*asked, *more]) == 0
        weights.append(load_file(tmp_path / name / "state_1" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys() and "fc.bias" not in weights[0]
    for name, value in weights[0].items():
        torch.testing.assert_close(value.float(), weights[1][name].float(), rtol=0, atol=1e-4)

    paths = hold_out(find_samples([str(made / "text_eagle3"), str(made / "image_eagle3")]))[0]
    counts = count_answers(paths, len(weights[0]["t2d"]), "")
    tokens = weights[0]["d2t"] + torch.arange(20)
    assert torch.equal(weights[0]["t2d"].nonzero()[:, 0], tokens) and counts[tokens].sum() == counts.topk(20)[0].sum()


def test_a_run_goes_on_where_it_stopped_and_its_head_decodes(made, config, tmp_path, monkeypatch):
    assert main_eagle3.main(flags(config, tmp_path / "whole", made / "text_eagle3")) == 0
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train"]["loss"] < 0.9 * lines[0]["train"]["loss"]
    assert lines[-1]["held_out"]["first1"] == lines[-1]["held_out"]["top1"]
    stopped = flags(config, tmp_path / "stopped", made / "text_eagle3")
    evaluate = eagle3.Eagle3Trainer.evaluate

    def interrupted(self):
        if self.epoch == 2:
            raise KeyboardInterrupt
        return evaluate(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(eagle3.Eagle3Trainer, "evaluate", interrupted)
        main_eagle3.main(stopped)
    assert main_eagle3.main(stopped) == 0
    found, expected = (load_file(tmp_path / one / "state_4" / "model.safetensors") for one in ("stopped", "whole"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    model = SpecModel.from_pretrained(TARGETS["llava"], str(tmp_path / "whole" / "state_4"), tree="12/3/4")
    assert model.draft.method == "eagle3"
    inputs = image_prompt(model.target.model, 1, ".a.")
    answer = model.specgenerate(**inputs, max_new_tokens=12)
    assert answer.tolist() == generate_by_target(model.target.model, inputs, max_new_tokens=12).tolist()


def test_data_of_other_layers_are_refused(made, config, tmp_path):
    values = json.loads(config.read_text())
    values["eagle_config"] = {AUX_LAYERS: [0, 1]}
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"layers 1 2 are not stored \(0 1 2 are\).* --store eagle3 --aux-layers 1 2"):
        main_eagle3.main(flags(config, tmp_path / "cp", made / "text_eagle3"))
    values.pop("eagle_config")
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="of 7 or more, and the target has 3"):
        main_eagle3.main(flags(config, tmp_path / "cp", made / "text_eagle3"))


def test_other_heads_are_trained_on_the_same_files(made, tmp_path):
    """The features are those of --store all."""
    sample = read_sample(next((made / "image_eagle3").glob("0*.safetensors")))
    assert sample.has_all_features() and sample.aux_layers == (0, 1, 2) and sample.images
    places, features = sample.read_by(()).inputs
    assert torch.equal(features, sample.hidden) and torch.equal(places, sample.hidden_positions)
    cut = sample.cut(len(sample) - 3)
    assert cut.aux.shape[0] <= len(cut) and torch.equal(cut.aux, sample.aux[: len(cut)])
    shared = ["--basepath", TARGETS["llava"], "--configpath", CONFIGS["llava"], "--tmpdir", str(made / "text_eagle3")]
    assert main.main([*shared, "--cpdir", str(tmp_path / "cp"), "--num-epochs", "1"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aux_layers": None}, "inputs of layers, but not of which"),
        ({"aux_layers": torch.tensor([0, 1])}, r"inputs .* of layers \[0, 1\], expected"),
        ({"aux_layers": torch.tensor([2, 1, 0])}, r"inputs .* of layers \[2, 1, 0\], expected"),
        ({"aux": torch.zeros(2, 192)}, r"inputs \(2, 192\) of layers"),
        ({"aux": torch.zeros(2, 192, dtype=torch.int64)}, "aux is int64"),
    ],
)
def test_broken_files_are_named(made, tmp_path, changes, message):
    source = next((made / "text_eagle3").glob("0*.safetensors"))
    tensors = {name: value for name, value in (load_file(source) | changes).items() if value is not None}
    save_file(tensors, tmp_path / "0.safetensors", metadata={"vispec": "{}"})
    with pytest.raises(ValueError, match=f"0.safetensors: {message}"):
        read_sample(tmp_path / "0.safetensors")


def test_layers_are_for_eagle3_data_alone(tmp_path):
    with pytest.raises(ValueError, match="--aux-layers 1 2: only --store eagle3 stores them"):
        generate("text", "llava", tmp_path, tmp_path / "out", "--aux-layers", "1", "2")


def test_a_draft_vocabulary_is_not_made_for_it(made, config, tmp_path):
    head = tmp_path / "head"
    head.mkdir()
    config.rename(head / "config.json")
    folders = ["--counts", str(made / "text_tokens"), "--size", "20", "--spec-model-path", str(head)]
    with pytest.raises(ValueError, match="an EAGLE-3 head, which has a vocabulary of its own"):
        draft_vocab.main(folders)


def test_the_plan_of_a_run(made, config, tmp_path, capsys):
    assert main_eagle3.main([*flags(config, tmp_path / "cp", made / "text_eagle3"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "parameters    67,072 trained" in printed and "x 3 step(s) x" in printed and not (tmp_path / "cp").exists()


def test_the_plan_counts_what_backward_reads(made, config, tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr("vispec.train.command.print_plan", lambda trainer, _: planned.append(trainer))
    for steps in (1, 5):
        main_eagle3.main([*flags(config, tmp_path / "cp", made / "text_eagle3", steps=steps), "--dry-run"])
    for trainer in planned:
        samples, kept = trainer.train_set, {}
        batch = collate([samples[(samples.lengths.index(max(samples.lengths)), None)]])
        others = [*trainer.head.state_dict().values(), batch.hidden]
        others = {tensor.untyped_storage().data_ptr() for tensor in others}

        def note(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outs = trainer.outputs(batch)
        found = sum(size for place, size in kept.items() if place not in others)
        parts = memory_estimate(trainer).items()
        told = sum(size for name, size in parts if name.startswith(("activations", "attention")))
        assert outs.requires_grad and 0.6 < told / found < 1.4
