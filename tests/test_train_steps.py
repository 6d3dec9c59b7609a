"""One optimizer step: the same gradients however its samples are divided; noise and order depend on nothing else."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_train_chain import LargestTensor

from vispec.ge_data.sample_file import make_sample, read_sample, write_sample
from vispec.model.drafts import DraftHead, ViSpecHead, load_draft
from vispec.model.drafts.config import DraftConfig
from vispec.train.losses import Objective
from vispec.train.nonfinite import one_row
from vispec.train.processes import Processes
from vispec.train.samples import (
    Noise,
    SampleFolder,
    collate,
    epoch_groups,
    find_samples,
    micro_batches,
)
from vispec.train.states import prune_states
from vispec.train.trainer import RESUME_FILE, Recipe, Trainer, schedule

SIZE, VOCABULARY = 16, 40
CONFIG = DraftConfig(SIZE, 24, 2, 2, VOCABULARY, 1e-5)
SHAPES = [(9, []), (40, [(3, 20)]), (23, [(1, 5), (5, 9)]), (30, []), (12, [(2, 6)]), (17, [(0, 4), (6, 9)])]
EIGHT_SHAPES = [*SHAPES, (14, []), (60, [(5, 11), (20, 29), (29, 41)])]


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def write_data(folder, shapes=SHAPES, size=SIZE, vocabulary=VOCABULARY):
    """A folder of samples of very different lengths, with several images, one and none."""
    generator = torch.Generator().manual_seed(0)
    for i, (length, images) in enumerate(shapes):
        mask = torch.zeros(length, dtype=torch.bool)
        mask[-6 - i : -1] = True
        if images:
            mask[: images[-1][1] + 1] = False
        embeds, hidden = torch.randn(2, length, size, generator=generator)
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        write_sample(folder / f"{i:08d}.safetensors", make_sample(ids, mask, images, embeds, hidden, store="all"))
    return folder


def make_trainer(folder, cpdir, method="vispec", noise=0.2, seed=1, processes=None, **settings):
    torch.manual_seed(seed)
    if method == "vispec":
        head = ViSpecHead(CONFIG, 3)
        head.reset_image_parameters()
        objective, steps = Objective.stage2(), 1
    else:
        head, objective, steps = DraftHead(CONFIG), Objective.stage1(), 0
    lm_head = torch.randn(VOCABULARY, SIZE)
    paths = find_samples([folder])
    cpdir.mkdir(exist_ok=True)
    processes = processes or Processes(torch.device("cpu"))
    recipe = Recipe(objective, lr=1e-2, mtp_steps=steps, **settings)
    train, held = SampleFolder(paths, 64, Noise(noise)), SampleFolder(paths[:2], 64)
    return Trainer(head, lm_head, train, held, recipe, cpdir, processes, {"settings": 1})


@pytest.mark.parametrize("method", ["eagle2", "vispec"])
def test_gradients_do_not_depend_on_the_division(data, tmp_path, method):
    trainer = make_trainer(data, tmp_path / "cp", method)
    gradients, losses = [], []
    for batch_size in (6, 1, 4):
        batches = micro_batches(range(6), batch_size, 0, 1)
        loaded = [collate([trainer.train_set[(i, 0)] for i in batch]) for batch in batches]
        losses.append(trainer.accumulate(loaded).loss)
        gradients.append([p.grad.clone() for p in trainer.parameters])
        trainer.optimizer.zero_grad()
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_processes_share_a_step():
    group = list(range(7))
    shares = [micro_batches(group, 2, process, 3) for process in range(3)]
    assert sorted(i for share in shares for batch in share for i in batch) == group


def test_an_epoch_s_order_depends_on_seed_epoch_and_step_size_alone():
    lengths = [10 + 7 * i % 31 for i in range(53)]
    groups = epoch_groups(lengths, 4, seed=0, epoch=2)
    assert sorted(i for group in groups for i in group) == list(range(53))
    assert groups == epoch_groups(lengths, 4, seed=0, epoch=2)
    assert groups != epoch_groups(lengths, 4, seed=0, epoch=3)
    assert len(epoch_groups(lengths, 4, seed=2**63 - 1, epoch=2)) == len(groups)
    spread = sum(max(lengths[i] for i in g) - min(lengths[i] for i in g) for g in groups) / len(groups)
    assert spread < 8


def test_noise(data):
    paths = find_samples([data])
    noisy = SampleFolder(paths, 64, Noise(0.2, seed=5))
    sample, features = noisy[(3, 1)]
    difference = (features - sample.hidden).abs()
    assert 0.9 < difference.max() / (0.5 * 0.2 * 512 / 30) <= 1.0
    assert torch.equal(noisy[(3, 1)][1], features)
    assert not torch.equal(noisy[(3, 2)][1], features)
    assert torch.equal(noisy[(3, None)][1], sample.hidden)
    # targets stay clean
    assert torch.equal(collate([noisy[(3, 1)]]).targets, collate([noisy[(3, None)]]).targets)


def test_a_loader_pins_the_tensors_of_a_batch(data, monkeypatch):
    """For a GPU: without a method of its own, a DataLoader hands an object on as it is."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    samples = SampleFolder(find_samples([data]), 64)
    batch = collate([samples[(i, None)] for i in range(2)])
    copy = batch.pin_memory()
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert len(pinned) == len(tensors) == 6
    for name, value in vars(batch).items():
        found = getattr(copy, name)
        assert torch.equal(found, value) and found is not value if name in tensors else found == value


def test_schedule():
    factors = [schedule(step, 10, 20) for step in range(200)]
    assert factors[0] == 0.1
    assert factors[9] == factors[10] == 1.0
    assert factors[105] == 0.5
    assert 0 < factors[-1] < 0.01
    only = [schedule(step, 10, 1) for step in range(10)]
    assert only[:6] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0] and only[6:] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert schedule(0, 1, 1) == 1.0


def test_an_interrupted_run_ends_with_the_same_weights(data, tmp_path):
    settings = {"epochs": 3, "batch_size": 2, "save_steps": 1}
    unbroken = make_trainer(data, tmp_path / "a", **settings)
    unbroken.run()
    broken = make_trainer(data, tmp_path / "b", **settings)
    calls = []

    def update(step):
        if step == 4:
            raise KeyboardInterrupt
        calls.append(step)
        Trainer.update(broken, step)

    broken.update = update
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    again = make_trainer(data, tmp_path / "b", seed=9, **settings)
    again.lm_head, again.head.embed_tokens = unbroken.lm_head, unbroken.head.embed_tokens  # the target's
    assert again.resume()
    assert (again.epoch, again.step_in_epoch) == (1, 1)
    again.run()
    for name, value in unbroken.head.state_dict().items():
        assert torch.equal(again.head.state_dict()[name], value), name
    lines = [[json.loads(x) for x in (tmp_path / f / "metrics.jsonl").read_text().splitlines()] for f in "ab"]
    assert [x["train"] for x in lines[0]] == [x["train"] for x in lines[1]]
    assert lines[0][-1]["held_out"]["first1"] == lines[0][-1]["held_out"]["top1"]
    assert (tmp_path / "a" / "state_3" / "model.safetensors").is_file()


def test_a_crash_in_evaluation_does_not_lose_the_epoch(data, tmp_path):
    settings = {"epochs": 3, "batch_size": 2}
    make_trainer(data, tmp_path / "a", **settings).run()
    broken = make_trainer(data, tmp_path / "b", **settings)
    evaluate, epochs = broken.evaluate, iter((1, 2))

    def fail_in_the_second():
        if next(epochs) == 2:
            raise MemoryError
        return evaluate()

    broken.evaluate = fail_in_the_second
    with pytest.raises(MemoryError):
        broken.run()
    again = make_trainer(data, tmp_path / "b", **settings)
    steps = []
    again.update = lambda step: steps.append(step) or Trainer.update(again, step)
    assert again.resume()
    assert again.seconds == broken.seconds > 0
    again.run()
    assert steps == [6, 7, 8]
    ends = [(tmp_path / name / "state_3" / "model.safetensors").read_bytes() for name in "ab"]
    assert ends[0] == ends[1]
    lines = [[json.loads(x) for x in (tmp_path / f / "metrics.jsonl").read_text().splitlines()] for f in "ab"]
    assert [(x["epoch"], x["train"], x["held_out"]) for x in lines[0]] == [
        (x["epoch"], x["train"], x["held_out"]) for x in lines[1]
    ]


def test_drafts_are_followed_in_some_steps_of_training(data, tmp_path, monkeypatch):
    monkeypatch.setattr("vispec.train.trainer.DRAFTS_EVERY", 4)
    trainer = make_trainer(data, tmp_path / "cp", epochs=3, batch_size=2)
    trainer.run()
    lines = [json.loads(x) for x in (tmp_path / "cp" / "metrics.jsonl").read_text().splitlines()]
    # the steps 0, 4 and 8, one of each epoch
    assert all({"first1", "first5", "tau_of_chain"} <= line["train"].keys() for line in lines)
    sums = trainer.accumulate([collate([trainer.train_set[(i, 0)] for i in range(6)])])
    assert trainer.steps_done == 9 and "first1" not in sums.summary()
    trainer.epoch, trainer.step_in_epoch = 0, 4
    summary = trainer.accumulate([collate([trainer.train_set[(i, 0)] for i in range(6)])]).summary()
    assert summary["first1"] == pytest.approx(summary["top1"], abs=1e-6)


def test_tokens_are_chosen_some_rows_at_a_time(data, tmp_path):
    trainer = make_trainer(data, tmp_path / "cp")
    trainer.lm_head, features = torch.randn(5000, SIZE), torch.randn(2000, SIZE)
    with LargestTensor() as largest:
        found = trainer._tokens(features)
    assert torch.equal(found, (features @ trainer.lm_head.T).argmax(-1))
    assert largest.numel <= 2**20 + 5000 * 256


def test_a_run_of_other_arguments_is_refused(data, tmp_path):
    trainer = make_trainer(data, tmp_path / "cp")
    trainer.save()
    trainer.identity = {"settings": 2}
    with pytest.raises(ValueError, match="settings 1 there, 2 now"):
        trainer.resume()


def test_a_loss_that_is_not_finite_names_the_file(data, tmp_path):
    trainer = make_trainer(data, tmp_path / "cp", noise=0.0)
    items = [trainer.train_set[(i, 0)] for i in range(3)]
    items[1][0].hidden[-3] = torch.nan
    with pytest.raises(ValueError, match="00000001"):
        trainer.accumulate([collate(items)])
    assert (tmp_path / "cp" / RESUME_FILE).is_file()


def test_a_held_out_loss_that_is_not_finite_names_the_file_and_leaves_the_state(data, tmp_path):
    trainer = make_trainer(data, tmp_path / "cp", epochs=1)
    good, spoiled = trainer.held_out_set.paths[1], tmp_path / "spoiled.safetensors"
    sample = read_sample(good)
    sample.hidden[-3] = torch.nan
    write_sample(spoiled, sample)
    trainer.held_out_set = SampleFolder([good, spoiled], 64)
    with pytest.raises(ValueError, match="held-out samples is not finite in [^,]*spoiled.safetensors;"):
        trainer.run()
    assert torch.load(tmp_path / "cp" / RESUME_FILE, weights_only=True)["step_in_epoch"] == trainer.steps_per_epoch


def test_a_gradient_that_is_not_finite_names_the_file(data, tmp_path):
    trainer = make_trainer(data, tmp_path / "cp")
    before = {name: value.clone() for name, value in trainer.head.state_dict().items()}
    items = [trainer.train_set[(i, 0)] for i in range(5)]
    outputs = trainer.outputs

    def with_bad_gradient(batch):
        outs = outputs(batch)
        if any("00000003" in name for name in batch.names):
            outs.register_hook(lambda gradient: gradient * torch.inf)
        return outs

    trainer.outputs = with_bad_gradient
    with pytest.raises(ValueError, match="gradient is not finite in .*00000003.safetensors; the state before") as error:
        trainer.accumulate([collate(items[:2]), collate(items[2:])])
    assert not any(f"0000000{i}" in str(error.value) for i in (0, 1, 2, 4))
    saved = torch.load(tmp_path / "cp" / RESUME_FILE, weights_only=True)["head"]
    assert all(torch.equal(value, before[name]) for name, value in saved.items())
    assert before.keys() - saved.keys() == {"embed_tokens.weight"}, "the table is the target's"
    assert all(parameter.grad is None for parameter in trainer.parameters)


def test_one_row_of_a_batch_has_the_loss_of_its_sample(data, tmp_path):
    trainer = make_trainer(data, tmp_path / "cp")
    items = [trainer.train_set[(i, 0)] for i in range(6)]
    batch = collate(items)
    for row, item in enumerate(items):
        alone, _ = trainer.loss(collate([item]))
        loss, _ = trainer.loss(one_row(batch, row))
        torch.testing.assert_close(loss, alone)


def test_clipping(data, tmp_path):
    """By value or by norm; the recorded norm is that of the gradient before."""
    applied = {}
    for name, settings in {
        "value": {"clip_value": 1e-3},
        "norm": {"clip_norm": 0.01},
        "none": {"clip_norm": 1e9},
    }.items():
        trainer = make_trainer(data, tmp_path / name, **settings)
        sums = trainer.accumulate([collate([trainer.train_set[(i, 0)] for i in range(6)])])
        before = torch.cat([p.grad.flatten() for p in trainer.parameters])
        assert sums.summary()["gradient_norm"] == pytest.approx(before.norm().item(), abs=1e-5)
        trainer.optimizer.step = lambda parameters=trainer.parameters, name=name: applied.update(
            {name: torch.cat([p.grad.flatten() for p in parameters])}
        )
        trainer.update(0)
    assert before.norm() > 0.02
    torch.testing.assert_close(applied["none"], before)
    torch.testing.assert_close(applied["value"], before.clamp(-1e-3, 1e-3))
    torch.testing.assert_close(applied["norm"], before * (0.01 / before.norm()), rtol=1e-4, atol=1e-7)


def test_the_last_checkpoint_is_the_state_after_the_last_epoch(data, tmp_path):
    """state_<n> comes after n epochs, none of them at learning rate 0; only the newest checkpoints stay."""
    trainer = make_trainer(data, tmp_path / "cp", epochs=5, batch_size=2, keep=2)
    rates = []

    def update(step):
        Trainer.update(trainer, step)
        rates.append(trainer.optimizer.param_groups[0]["lr"])

    trainer.update = update
    trainer.run()
    assert len(rates) == 5 * 3 and min(rates) > 0
    assert sorted(path.name for path in (tmp_path / "cp").iterdir() if path.is_dir()) == ["state_4", "state_5"]
    saved = load_draft(tmp_path / "cp" / "state_5").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in trainer.head.state_dict().items())


def test_pruning_spares_what_it_does_not_know(tmp_path):
    for name in ("state_1", "state_2", "state_10", "state_11", "state_x", "state_3.old"):
        (tmp_path / name).mkdir()
    prune_states(tmp_path, keep=2, epoch=10)
    assert {path.name for path in tmp_path.iterdir()} == {"state_2", "state_10", "state_11", "state_x", "state_3.old"}
    prune_states(tmp_path, keep=0, epoch=11)
    assert (tmp_path / "state_2").is_dir()


def test_a_half_written_checkpoint_is_never_seen(data, tmp_path, monkeypatch):
    trainer = make_trainer(data, tmp_path / "cp", epochs=1)

    def killed(path, value):
        raise KeyboardInterrupt

    monkeypatch.setattr("vispec.model.drafts.checkpoints.write_json_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert not list((tmp_path / "cp").glob("state_*")) and list((tmp_path / "cp").glob(".state_*"))
    monkeypatch.undo()
    (tmp_path / "cp" / ".resume.pt.0_halves.unfinished").write_bytes(b"half")
    (tmp_path / "cp" / ".state_7.removed").mkdir()
    others = [".state_notes.unfinished", ".metrics.jsonl.bak", ".resume.pt.original", ".training.json.0_halves"]
    for name in others:
        (tmp_path / "cp" / name).mkdir()
    (tmp_path / "cp" / "metrics.jsonl").write_text('{"epoch": 1, "tr')
    make_trainer(data, tmp_path / "cp", epochs=1).run()
    assert load_draft(tmp_path / "cp" / "state_1").method == "vispec"
    left = {path.name for path in (tmp_path / "cp").glob(".*")}
    assert left == set(others), "what we did not make stays"
    assert [json.loads(x)["epoch"] for x in (tmp_path / "cp" / "metrics.jsonl").read_text().splitlines()] == [1]


def test_tensorboard_has_every_step_once(data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {"epochs": 2, "batch_size": 2, "save_steps": 2, "report_to": "tensorboard"}
    broken = make_trainer(data, tmp_path / "cp", **settings)

    def update(step):
        if step == 5:  # steps 4 and 5 are done, the state is that of 3, the end of the first epoch
            raise KeyboardInterrupt
        Trainer.update(broken, step)

    broken.update = update
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    again = make_trainer(data, tmp_path / "cp", **settings)
    again.resume()
    again.run()
    events = accumulator.EventAccumulator(str(tmp_path / "cp" / "tensorboard"))
    events.Reload()
    losses = {"loss", "feature", "token", "ranking", "top1", "top2", "top3"}
    drafts = {"first1", "first2", "first3", "first4", "first5", "tau_of_chain"}
    groups = {"train_step": losses | {"lr", "gradient_norm"}, "held_out": losses | drafts}
    groups["train"] = groups["train_step"] | drafts
    tags = events.Tags()["scalars"]
    for group, names in groups.items():
        assert {f"{group}/{name}" for name in names} <= set(tags)
        steps = [event.step for event in events.Scalars(f"{group}/loss")]
        assert steps == ([1, 2, 3, 4, 5, 6] if group == "train_step" else [3, 6])


def test_eagle2_refuses_images_without_features(data):
    sample = SampleFolder(find_samples([data]), 64)[(1, None)][0]
    rows = torch.ones(len(sample), SIZE)
    reduced = make_sample(sample.input_ids, sample.loss_mask, sample.images, rows, rows)
    write_sample(data / "00000001.safetensors", reduced)
    with pytest.raises(ValueError, match="00000001.*--store all"):
        SampleFolder(find_samples([data]), 64, all_features=True)[(1, None)]
    assert SimpleNamespace(**vars(reduced)).images == [(3, 20)]
