"""SpecVLM's draft head: its compressor, its gate, its files; and it is lossless like the other methods."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from test_tree import CONFIG
from tiny_models import FAMILIES, as_prompt, bare_head, greedy_lengths, random_head, random_target, randomize

from vispec import SpecModel
from vispec.model.drafts import SpecVLMHead, load_draft
from vispec.model.drafts.base import Kept
from vispec.model.drafts.checkpoints import save_draft
from vispec.model.drafts.specvlm import BRANCHES, GATED, KEY, MODE, Compression, Compressor
from vispec.model.pairs import plan_pairs

FINE = Compression(prune=4, pool=3, conv=2)


def described(how: Compression):
    return replace(CONFIG, extra={KEY: asdict(how)})


def head_of(how: Compression, seed: int = 1) -> SpecVLMHead:
    return bare_head(described(how), "specvlm", seed)


# --- the compressor ---


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12])
def test_rows_of_the_branches(n):
    compressor, image = head_of(FINE).compressor, torch.randn(n, CONFIG.hidden_size)
    rows = {name: compressor.branch(name, image) for name in BRANCHES["select"]}
    expected = {"prune": -(-n // 4), "pool": -(-n // 3), "conv": -(-n // 2), "resampler": 2, "text": 0}
    assert {name: len(found) for name, found in rows.items()} == expected
    assert all(FINE.rows(name, n) == count for name, count in expected.items())
    places = [int((image == row).all(1).nonzero()) for row in rows["prune"]]
    assert places == sorted(set(places)) and torch.equal(rows["prune"], compressor.branch("prune", image))
    for place, row in enumerate(rows["pool"]):
        torch.testing.assert_close(row, image[3 * place : 3 * place + 3].mean(0))
    kernel, padded = compressor.conv.weight, torch.cat([image, image.new_zeros(1, image.shape[1])])
    for place, row in enumerate(rows["conv"]):
        window = padded[2 * place : 2 * place + 2]
        torch.testing.assert_close(row, torch.einsum("oik,ki->o", kernel, window) + compressor.conv.bias)


def test_a_new_convolution_is_the_mean():
    compressor = Compressor(CONFIG, Compression("weight", 3, 3, 3))
    image = torch.randn(9, CONFIG.hidden_size)
    torch.testing.assert_close(compressor.branch("conv", image), compressor.branch("pool", image))
    assert compressor.weights(torch.randn(2, CONFIG.hidden_size)).tolist() == [[pytest.approx(1 / 3)] * 3] * 2


@pytest.mark.parametrize("mode", ["weight", "concat", "select"])
def test_what_becomes_of_an_image(mode):
    how = Compression("weight", 3, 3, 3) if mode == "weight" else replace(FINE, mode=mode)
    compressor, features = head_of(how).compressor, torch.randn(2, CONFIG.hidden_size) * 4
    weights = compressor.weights(features) if mode in GATED else None
    for prompt, mix in enumerate(compressor.mixes(2, weights)):
        for n in (1, 2, 8):
            image = torch.randn(n, CONFIG.hidden_size)
            rows, branches = compressor(image, mix), [compressor.branch(name, image) for name in BRANCHES[mode]]
            assert len(rows) == compressor.count(mix, n)
            if mode == "weight":
                assert weights[prompt].sum().item() == pytest.approx(1)
                parts = [weight * branch for weight, branch in zip(weights[prompt], branches, strict=True)]
                torch.testing.assert_close(rows, sum(parts))
            elif mode == "select":
                logits = compressor.gate(features)[prompt]
                assert torch.equal(rows, branches[logits.argmax()])
            else:
                assert torch.equal(rows, torch.cat(branches))


def test_the_gate_draws_in_training_and_learns_through_what_it_drew():
    compressor = head_of(FINE).compressor
    features = torch.zeros(1, CONFIG.hidden_size)
    noise = torch.full((1, 5), -5.0)
    noise[0, 1] = 5.0
    weights = compressor.weights(features, noise)
    assert weights.tolist() == [[0, 1, 0, 0, 0]] != compressor.weights(features).tolist()
    (mix,) = compressor.mixes(1, weights)
    compressor(torch.randn(6, CONFIG.hidden_size), mix).square().sum().backward()
    assert compressor.gate[0].bias.grad.abs().max() > 0
    gradient = compressor.gate[-1].bias.grad
    # what the drawn one gains the others lose
    assert gradient[1] > 0 and (gradient[[0, 2, 3, 4]] < 0).all()


def test_the_gate_reads_what_text_pairs_read_of_the_prompt():
    head = head_of(FINE)
    features, images = torch.randn(2, 9, CONFIG.hidden_size), [[(2, 5), (5, 7)], []]
    found = head.weights(features, images, [9, 4], noise=None)
    means = torch.stack([features[0, [0, 6, 7, 8]].mean(0), features[1, :4].mean(0)])
    torch.testing.assert_close(found, head.compressor.weights(means))


def test_images_of_different_counts_take_the_last_places_of_their_runs():
    layout = plan_pairs([12], [[(2, 6), (6, 9), (10, 11)]], [[2, 0, 3]])
    # pairs 1…4 and 5…7 are of images, then 9: two vectors, none, and three where there is one place
    assert layout.positions.tolist() == [[0, 3, 4, 8, 9, 9, 9, 10, 11]]
    assert layout.compressed.tolist() == [[-1, 0, 1, -1, 2, 3, 4, -1, -1]]


# --- decoding ---


@pytest.mark.parametrize("how", [Compression.of_mode(mode) for mode in BRANCHES] + [FINE], ids=lambda how: how.mode)
@torch.inference_mode()
def test_a_sequence_in_one_pass_and_as_decoding_reads_it(how):
    """Prompt, then pairs one by one: what training computes of the same sequence."""
    head = head_of(how)
    length, prompt, images = 17, 13, [(1, 5), (5, 10)]
    hidden, embeds = torch.randn(1, length, CONFIG.hidden_size), torch.randn(1, length, CONFIG.hidden_size)
    tokens = torch.randint(CONFIG.vocab_size, (1, length - prompt + 1))
    embeds[:, prompt:] = head.embed(tokens[:, :-1])
    next_embeds = torch.cat([embeds[:, 1:], head.embed(tokens[:, -1:])], dim=1)
    layout = head.plan([length], [images], head.weights(hidden, [images], [prompt]))
    out = head(hidden, embeds, next_embeds, [images], layout=layout)
    memory = head.memory(1, 60, type("Place", (), {"device": hidden.device, "dtype": torch.float32}))
    memory.used = head.read(memory, as_prompt(hidden[:, :prompt], embeds[:, :prompt], images))
    for place in range(prompt - 1, length):
        token = tokens[:, place - prompt + 1 : place - prompt + 2]
        head.extend(memory, Kept(hidden[:, place : place + 1], token, torch.ones(1, dtype=torch.long)))
        torch.testing.assert_close(memory.estimate, out[:, place], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "mode"),
    [*((family, "select") for family in FAMILIES), *(("llava_1.5", mode) for mode in ("weight", "concat", "none"))],
)
def test_greedy_answers_are_the_targets(family, mode):
    target = random_target(family, 2, vocabulary=9)
    config = replace(Compression.of_mode(mode), conv=2) if mode != "weight" else Compression(mode, 2, 2, 2)
    head = random_head(target, "specvlm", seed=6, extra={KEY: asdict(config)})
    lengths = greedy_lengths(SpecModel(target, head, 30, 3, 8), (".", ".a.", "a.bb."), 20)
    assert max(lengths) >= 1, "nothing was accepted, so nothing was tested"


def test_the_gate_decides_what_the_head_reads():
    """An untrained gate begins with the first branch of all; one that prefers text drops the image."""
    head = head_of(FINE)
    torch.nn.init.zeros_(head.compressor.gate[-1].weight)
    pairs = {}
    for place, name in enumerate(BRANCHES["select"]):
        with torch.no_grad():
            head.compressor.gate[-1].bias.copy_(torch.eye(5)[place])
        weights = head.weights(torch.randn(1, 12, CONFIG.hidden_size), [[(1, 9)]], [12])
        pairs[name] = int(head.plan([12], [[(1, 9)]], weights).lengths)
    assert pairs == {"prune": 6, "pool": 7, "conv": 8, "resampler": 6, "text": 4}


# --- files ---


@pytest.mark.parametrize("mode", BRANCHES)
def test_a_head_says_how_it_compresses(tmp_path, mode):
    head = SpecVLMHead(SpecVLMHead.new_config(CONFIG, mode))
    randomize(head, 3, 0.1)
    head.save_pretrained(tmp_path)
    again = load_draft(str(tmp_path))
    assert (again.method, again.compressor.how) == ("specvlm", Compression.of_mode(mode))
    assert all(torch.equal(tensor, head.state_dict()[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(ValueError, match="these are specvlm weights, method 'eagle2' was asked for"):
        load_draft(str(tmp_path), "eagle2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "config.json: compressor is None, expected an object of conv, mode, pool, prune, queries"),
        ({"mode": "zip"}, "config.json: compressor: mode 'zip' is not one of weight, concat, select, none"),
        ({"pool": 0}, "config.json: compressor: pool must be at least 1, found 0"),
        ({"conv": "3"}, "config.json: compressor: conv must be a number, found '3'"),
        ({"size": 3}, "config.json: compressor is {.*'size': 3.*}, expected an object of conv"),
        ({"mode": "weight"}, "mode weight sums rows of one ratio, found prune 20, pool 20, conv 3"),
        ({"conv": 4}, r"compressor.conv.weight has shape \(\d+, \d+, 3\), the config asks for \(\d+, \d+, 4\)"),
        ({"queries": 3}, r"compressor.resampler.q has shape \(2, .*\), the config asks for \(3, "),
        ({"mode": "none"}, "unexpected tensor.s. compressor.conv.bias"),
    ],
)
def test_a_wrong_compressor_is_named(tmp_path, change, message):
    save_draft(head_of(Compression()), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config[KEY] = change and config[KEY] | change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_draft(str(tmp_path))


def test_the_config_of_a_new_head():
    assert SpecVLMHead.new_config(CONFIG).extra[KEY]["mode"] == MODE
    own = described(FINE)
    assert SpecVLMHead.new_config(own, "select") is own
    with pytest.raises(ValueError, match="compressor has mode 'select', 'concat' was asked for"):
        SpecVLMHead.new_config(own, "concat")
