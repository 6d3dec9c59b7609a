"""Training of Medusa's heads: the loss of the definition, and heads that decode."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from tiny_models import GOLDEN, bare_head, generate, text_prompt

from vispec import SpecModel
from vispec.ge_data.sample_file import make_sample, write_sample
from vispec.model.drafts.config import DraftConfig
from vispec.model.loading import load_target
from vispec.model.target import Target
from vispec.train import main_medusa
from vispec.train.losses import Objective
from vispec.train.medusa import MedusaTrainer
from vispec.train.processes import Processes
from vispec.train.samples import SampleFolder
from vispec.train.trainer import Recipe

SIZE, VOCABULARY, HEADS = 16, 30, 5
CONFIG = DraftConfig(SIZE, 24, 4, 4, VOCABULARY, 1e-5)
LLAVA = str(GOLDEN / "llava_next" / "target")


def make_trainer(folder: Path, samples: list) -> MedusaTrainer:
    for index, sample in enumerate(samples):
        write_sample(folder / f"{index:08d}.safetensors", sample)
    paths = sorted(folder.glob("*.safetensors"))
    recipe = Recipe(Objective.eagle(), lr=1e-2)
    lm_head = torch.randn(VOCABULARY, SIZE, generator=torch.Generator().manual_seed(1))
    data = SampleFolder(paths, 64), SampleFolder(paths, 64)
    head = bare_head(CONFIG, "medusa", seed=2)
    return MedusaTrainer(head, lm_head, *data, recipe, folder, Processes(torch.device("cpu")), {})


def random_sample(seed: int, length: int, assistant: list[tuple[int, int]], images=(), store="pairs"):
    """The sample as it is stored, and all its features (L, H) and its mask (L,)."""
    generator = torch.Generator().manual_seed(seed)
    hidden, embeds = torch.randn(2, length, SIZE, generator=generator)
    ids = torch.randint(VOCABULARY, (length,), generator=generator)
    mask = torch.zeros(length, dtype=torch.bool)
    for start, end in assistant:
        mask[start:end] = True
    return make_sample(ids, mask, list(images), embeds, hidden, store), hidden, mask


def loss_by_definition(head, lm_head: torch.Tensor, samples: list) -> torch.Tensor:
    """Head j at token i against the feature of token i + 1 + j, wherever token i + 2 + j is the assistant's."""
    losses = []
    for _, hidden, mask in samples:
        for j in range(HEADS):
            linear = head.medusa_head[j][0].linear
            for i in range(len(hidden) - 2 - j):
                if mask[i + 2 + j]:
                    out = hidden[i] + F.silu(linear.weight @ hidden[i] + linear.bias)
                    target = hidden[i + 1 + j]
                    cross_entropy = -((lm_head @ target).softmax(-1) * (lm_head @ out).log_softmax(-1)).sum()
                    losses.append(F.smooth_l1_loss(out, target) + 0.1 * cross_entropy)
    return torch.stack(losses).mean()


def test_loss_and_gradients_are_those_of_the_definition(tmp_path):
    samples = [
        random_sample(1, 20, [(8, 12), (15, 20)]),
        random_sample(2, 13, [(6, 13)]),
        random_sample(3, 24, [(12, 23)], images=[(1, 4), (5, 7)]),
    ]
    trainer = make_trainer(tmp_path, [sample for sample, _, _ in samples])
    expected = loss_by_definition(trainer.head, trainer.lm_head, samples)
    gradients = torch.autograd.grad(expected, trainer.parameters)
    for division in ([[0, 1, 2]], [[0], [2, 1]]):
        keys = [[(index, None) for index in batch] for batch in division]
        sums = trainer.accumulate(list(trainer._loader(trainer.train_set, keys)))
        assert sums.loss == pytest.approx(expected.item(), rel=1e-5)
        for parameter, gradient in zip(trainer.parameters, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
        trainer.optimizer.zero_grad()


def test_pairs_without_a_feature_for_every_head_are_not_scored(tmp_path):
    """An answer right at the start or right behind an image, whether or not the image's features are stored."""
    at_start = random_sample(1, 12, [(2, 12)])
    behind_image = [random_sample(2, 20, [(9, 20)], [(2, 8)], store) for store in ("pairs", "all")]
    trainer = make_trainer(tmp_path, [sample for sample, _, _ in (at_start, *behind_image)])
    (batch,) = trainer._loader(trainer.train_set, [[(0, None), (1, None), (2, None)]])
    places = [divmod(place, 20) for place in batch.scored.tolist()]
    assert [pair for row, pair in places if row == 0] == list(range(4, 10))
    for row in (1, 2):  # the pairs 1 to 6 are the image's, so head 4 begins at pair 11
        assert [pair for found, pair in places if found == row] == list(range(11, 18))
    assert len(batch.targets) == len(batch.scored)


@pytest.fixture(scope="module")
def target_samples(tmp_path_factory) -> Path:
    """The target's features of its own greedy answers."""
    folder = tmp_path_factory.mktemp("samples")
    target = Target(load_target(LLAVA))
    for index in range(8):
        ids = generate(target.model, text_prompt(target.model, 8, seed=index), max_new_tokens=24, eos_token_id=None)
        prompt = target.prefill(target.new_cache(1, ids.shape[1]), ids, {})
        mask = torch.arange(ids.shape[1]) >= 8
        sample = make_sample(ids[0], mask, [], prompt.embeds[0], prompt.hidden[0])
        write_sample(folder / f"{index:08d}.safetensors", sample)
    return folder


def test_a_trained_head_decodes(target_samples, tmp_path):
    config = str(GOLDEN / "llava_next" / "draft_eagle2" / "config.json")
    arguments = ["--basepath", LLAVA, "--configpath", config, "--tmpdir", str(target_samples), "--noise", "0"]
    arguments += ["--cpdir", str(tmp_path), "--lr", "1e-2", "--bs", "2", "--num-epochs", "6", "--save-every", "3"]
    assert main_medusa.main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train"]["loss"] < 0.8 * lines[0]["train"]["loss"]
    assert lines[-1]["held_out"]["first1"] == lines[-1]["held_out"]["top1"]
    card = ModelCard.load(tmp_path / "state_6" / "README.md")
    assert card.data.library_name == "vispec" and "medusa" in card.data.tags
    assert f"{lines[-1]['held_out']['loss']:.4g}" in card.text and "| epoch | 6 |" in card.text

    model = SpecModel.from_pretrained(LLAVA, str(tmp_path / "state_6"), total_token=20, top_k=4)
    assert model.draft.method == "medusa" and model.shape.levels == HEADS
    lengths = []
    for seed in range(3):
        inputs = text_prompt(model.target.model, 8, seed)
        answer, accepted = model.specgenerate(**inputs, max_new_tokens=20, return_acceptance_len=True)
        assert answer.tolist() == generate(model.target.model, inputs, max_new_tokens=20).tolist()
        lengths += accepted
    assert sum(lengths) > 0
    with pytest.raises(ValueError, match="--loadpath .* is a eagle2 head, this command trains medusa"):
        eagle2 = str(GOLDEN / "llava_next" / "draft_eagle2")
        main_medusa.main([*arguments, "--cpdir", str(tmp_path / "other"), "--loadpath", eagle2])
