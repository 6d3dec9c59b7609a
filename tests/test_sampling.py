"""Sampled decoding follows the target's own distribution, measured by chi-square with fixed seeds.

The joint distribution of the first three tokens is enumerated exactly and compared with many runs. Acceptance is
measured at the level of tensors over tens of thousands of rows, the whole machine end to end over fewer. Wrong rules of
acceptance that look plausible are measured too: a test that could not reject them would prove nothing.
"""

from collections.abc import Callable

import pytest
import torch
from scipy.stats import chi2
from tiny_models import image_prompt, random_head, random_target, text_prompt
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vispec import SpecModel
from vispec.ge_data.batch_generate import collate_prompts
from vispec.model.sampling import Accepted, Choice, Sampling, accept, row_seeds
from vispec.model.shape import TreeShape
from vispec.model.tree import Candidates, Tree, choose_nodes

V = 6
"""Tokens of the vocabulary."""
ROOT = 2
"""The token before the three that are measured."""
REJECT_BELOW = 1e-3
WARM = {"temperature": 1.2, "top_p": 0.85, "top_k": 4}

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 0.8, "top_p": 0.8, "top_k": 4},
    {"temperature": 1.3, "top_p": 0.75, "top_k": 5},
]


def warped(logits: torch.Tensor, temperature: float, top_p: float = 0.0, top_k: int = 0) -> torch.Tensor:
    """(…, V) probabilities by transformers' warpers, written out in the order of its generate()."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers(None, logits.reshape(-1, V)).softmax(-1).view(logits.shape)


def p_value(samples: torch.Tensor, exact: torch.Tensor) -> float:
    """Chi-square of samples (B, 3) against exact probabilities (V, V, V); rare outcomes are pooled."""
    cells = (samples[:, 0] * V + samples[:, 1]) * V + samples[:, 2]
    counts = torch.bincount(cells, minlength=V**3).double()
    expected = exact.double().flatten() * len(samples)
    if counts[expected == 0].any():
        return 0.0
    common = expected >= 5
    observed, expected = (
        torch.cat([x[common], x[~common].sum()[None]]) if x[~common].sum() > 0 else x[common]
        for x in (counts, expected)
    )
    return float(chi2.sf(float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1))


# --- acceptance over many rows, with a target that is a table ---

LOGITS = torch.randn(V, V, V, generator=torch.Generator().manual_seed(0)) * 1.5
"""Logits of the next token given the two before it."""


def exact_distribution(**settings) -> torch.Tensor:
    """(V, V, V) of the three tokens after [0, ROOT]."""
    p = warped(LOGITS, **settings)
    return p[0, ROOT][:, None, None] * p[ROOT][:, :, None] * p


def drafted_tree(root: torch.Tensor, shape: TreeShape) -> Tree:
    """A tree that a draft head could have grown: it depends on the root alone."""
    table = torch.randn(V, shape.candidates, generator=torch.Generator().manual_seed(1))
    k = shape.top_k
    parents = torch.full((shape.candidates,), -1)
    scores, tokens = table.clone(), torch.zeros(V, shape.candidates, dtype=torch.long)
    for first in range(0, shape.candidates, k):  # k children of one parent, all different
        tokens[:, first : first + k] = table[:, first : first + k].softmax(-1).argsort(-1)
        if first:
            parents[first : first + k] = (first - k) // k
            scores[:, first : first + k] = scores[:, parents[first : first + k]] - table[:, first : first + k].abs()
    candidates = Candidates(scores[root], tokens[root], parents.expand(len(root), -1))
    return choose_nodes(root, candidates, shape)


Rule = Callable[[Sampling, Tree, torch.Tensor], Accepted]
"""From the target's logits (B, N, V) at the nodes of a tree to what is kept of it."""


class Drawn(Choice):
    """Draws for thousands of rows in one call; which node gets which noise is the product's."""

    def noise(self, answers, depths, like):
        return torch.empty(like.shape[0], len(depths), V).exponential_()


def choose(sampling: Sampling, tree: Tree, logits: torch.Tensor) -> torch.Tensor:
    return Drawn(sampling.warpers, seeds=()).choose(logits, (), tree)


def our_rule(sampling: Sampling, tree: Tree, logits: torch.Tensor) -> Accepted:
    return accept(tree, choose(sampling, tree, logits))


def decode(rule: Rule, sampling: Sampling, batch: int, shape: TreeShape) -> torch.Tensor:
    """(batch, 3): rounds of speculative decoding over the table, until every row has three tokens."""
    torch.manual_seed(1234)
    before, root = torch.zeros(batch, dtype=torch.long), torch.full((batch,), ROOT)
    # rows write behind their last token; what goes beyond three is dropped
    answer = torch.full((batch, 3 + shape.levels + 1), -1)
    lengths = torch.zeros(batch, dtype=torch.long)
    while int(lengths.min()) < 3:
        tree = drafted_tree(root, shape)
        parent_tokens = tree.tokens.gather(1, tree.parents)
        parent_tokens[:, 0] = before
        accepted = rule(sampling, tree, LOGITS[parent_tokens, tree.tokens])
        steps = torch.arange(shape.levels + 1)
        fresh = steps <= accepted.count[:, None]
        places = (lengths[:, None] + steps).clamp(max=answer.shape[1] - 1)
        keep = fresh & (lengths < 3)[:, None]
        answer.scatter_(1, places, torch.where(keep, accepted.tokens, answer.gather(1, places)))
        path_tokens = torch.cat([root[:, None], accepted.tokens], dim=1)
        before = path_tokens.gather(1, accepted.count[:, None])[:, 0]
        root = accepted.root
        lengths += accepted.count + 1
    return answer[:, :3]


SHAPES = [TreeShape(2, 0, 1), TreeShape(9, 1, 4), TreeShape(25, 2, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_acceptance_is_target_sampling(settings, shape):
    samples = decode(our_rule, Sampling(**settings), 12_000, shape)
    assert p_value(samples, exact_distribution(**settings)) > REJECT_BELOW


def always_take_the_favourite(sampling: Sampling, tree: Tree, logits: torch.Tensor) -> Accepted:
    """Wrong: a drafted token is accepted whenever it is the target's most likely one."""
    chosen, best = choose(sampling, tree, logits), logits.argmax(-1)
    is_child = tree.parents[:, :, None] == torch.arange(tree.tokens.shape[1])
    is_child[:, 0] = False
    drafted = (is_child & (tree.tokens[:, :, None] == best[:, None, :])).any(1)
    return accept(tree, torch.where(drafted, best, chosen))


def draw_the_root_again(sampling: Sampling, tree: Tree, logits: torch.Tensor) -> Accepted:
    """Wrong: when no child is accepted the next root is drawn from all of p, as if none had been rejected."""
    accepted = accept(tree, choose(sampling, tree, logits))
    last = accepted.path.gather(1, accepted.count[:, None])
    again = choose(sampling, tree, logits).gather(1, last)
    accepted.tokens.scatter_(1, accepted.count[:, None], again)
    accepted.root = again[:, 0]
    return accepted


def top_p_before_top_k(sampling: Sampling, tree: Tree, logits: torch.Tensor) -> Accepted:
    """Wrong order of the warpers, as the reference has it."""
    flat = TemperatureLogitsWarper(sampling.temperature)(None, logits.reshape(-1, V))
    flat = TopKLogitsWarper(sampling.top_k)(None, TopPLogitsWarper(sampling.top_p)(None, flat))
    return accept(tree, torch.multinomial(flat.softmax(-1), 1).view(logits.shape[:-1]))


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (always_take_the_favourite, {"temperature": 1.0}),
        (draw_the_root_again, {"temperature": 1.0}),
        (top_p_before_top_k, {"temperature": 1.3, "top_p": 0.75, "top_k": 5}),
    ],
)
def test_chi_square_rejects_wrong_rules(rule, settings):
    samples = decode(rule, Sampling(**settings), 12_000, TreeShape(9, 1, 4))
    assert p_value(samples, exact_distribution(**settings)) < 1e-9


# --- warping ---


def probabilities(logits: torch.Tensor, **settings) -> torch.Tensor:
    return Choice(Sampling(**settings).warpers).scores(logits).softmax(-1)


@pytest.mark.parametrize("settings", SETTINGS)
def test_warping_is_what_generate_does(settings):
    """Against the raw and the processed scores that generate() itself hands out."""
    target = random_target("llava_1.5", seed=0)
    out = target.generate(
        **text_prompt(target, 4, seed=0),
        do_sample=True,
        max_new_tokens=8,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings},
    )
    logits, expected = torch.stack(out.logits), torch.stack(out.scores).softmax(-1)
    torch.testing.assert_close(probabilities(logits, **settings), expected)


def test_what_is_off_does_nothing():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(3))
    plain = probabilities(logits, temperature=1.0)
    torch.testing.assert_close(plain, logits.softmax(-1))
    for settings in ({"top_p": 1.0}, {"top_k": 30}, {"top_k": 500}, {"top_p": 0.0, "top_k": 0}):
        torch.testing.assert_close(probabilities(logits, temperature=1.0, **settings), plain)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-5])
def test_cold_is_greedy(temperature):
    logits = torch.randn(3, 7, 30, generator=torch.Generator().manual_seed(4))
    sampling = Sampling(temperature=temperature, top_p=0.9, top_k=5)
    assert sampling.greedy
    assert torch.equal(sampling.choice(3).choose(logits, ()), logits.argmax(-1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must not be negative, found -0.1"),
        ({"top_p": 1.5}, "top_p must be between 0 and 1, found 1.5"),
        ({"top_k": -1}, "top_k must not be negative, found -1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


# --- end to end ---


@pytest.fixture(scope="module")
def small_pair() -> SpecModel:
    target = random_target("llava_1.5", seed=11, vocabulary=V, std=0.15)
    return SpecModel(target, random_head(target, "eagle2", seed=12), total_token=9, depth=1, top_k=4)


@torch.inference_mode()
def enumerate_target(model: SpecModel, prompt: torch.Tensor, settings: dict) -> torch.Tensor:
    """(V, V, V) of the first three new tokens, by the target's plain passes over all prefixes."""
    target = model.target.model
    every = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    sequences = torch.cat([prompt.expand(len(every), -1), every], dim=1)
    p = warped(target(input_ids=sequences).logits[:, -3:], **settings).view(V, V, 3, V)
    return p[0, 0, 0][:, None, None] * p[:, 0, 1][:, :, None] * p[:, :, 2]


def check_sampled(model: SpecModel, prompt: torch.Tensor, settings: dict, answers: int = 600, least: int = 150) -> None:
    """Answers of three tokens follow the target, and drafts are accepted, at `least` so many tokens of all."""
    exact = enumerate_target(model, prompt, settings)
    torch.manual_seed(5)
    found, lengths = [], []
    for _ in range(answers):
        answer, accepted = model.specgenerate(prompt, **settings, max_new_tokens=3, return_acceptance_len=True)
        found.append(answer[0, -3:])
        lengths += accepted
    assert sum(lengths) > least, "drafts were accepted"
    assert p_value(torch.stack(found), exact) > REJECT_BELOW


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, WARM])
def test_whole_answers_follow_the_target(small_pair, settings):
    check_sampled(small_pair, text_prompt(small_pair.target.model, 3, seed=1)["input_ids"], settings)


def test_baseline_follows_the_target(small_pair):
    inputs, settings = text_prompt(small_pair.target.model, 3, seed=1), WARM
    exact = enumerate_target(small_pair, inputs["input_ids"], settings)
    torch.manual_seed(6)
    answers = [small_pair.baseline_generate(**inputs, **settings, max_new_tokens=3)[0, -3:] for _ in range(400)]
    assert p_value(torch.stack(answers), exact) > REJECT_BELOW


# --- seeds ---


def sampled(model: SpecModel, inputs: dict, arm: str = "specgenerate", seed: int = 0, **settings) -> list[list[int]]:
    """The rows' new tokens."""
    torch.manual_seed(seed)
    out = getattr(model, arm)(**inputs, **{"temperature": 1.0, "max_new_tokens": 24, **settings})
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "top_p": 0.9, "top_k": 9}])
@pytest.mark.parametrize("method", ["vispec", "eagle2", "eagle3", "msd", "specvlm", "medusa"])
def test_a_seed_says_the_same_with_any_tree_and_without_one(method, settings):
    target = random_target("qwen2_5_vl", 2, vocabulary=12, std=0.1)
    model = SpecModel(target, random_head(target, method, seed=3))
    inputs = image_prompt(target, 1, ".a.b")
    plain = {seed: sampled(model, inputs, "baseline_generate", seed, **settings) for seed in (1, 2)}
    assert plain[1] != plain[2], "the seed has no say"
    for tree in ("2/0/1", "12/3/4", "30/3/8", "16/7/2", "auto"):
        assert {seed: sampled(model.with_tree(tree), inputs, seed=seed, **settings) for seed in plain} == plain
    _, lengths = model.specgenerate(**inputs, temperature=1.0, max_new_tokens=24, return_acceptance_len=True)
    assert sum(lengths) > 0, "nothing was accepted, so nothing was tested"


def test_a_row_draws_what_it_draws_alone(monkeypatch):
    """Whatever its neighbours are, and whether they have left: only its own seed and its own positions count."""
    target = random_target("llava_1.5", 2, vocabulary=12, std=0.1)
    target.generation_config.eos_token_id = 5
    model = SpecModel(target, random_head(target, "vispec", seed=3), tree="12/3/4")
    prompts = [text_prompt(target, length, seed=length) for length in (3, 9, 6, 4)]
    monkeypatch.setattr("vispec.model.sampling.row_seeds", lambda seed, rows: seeds)
    alone = []
    for seed, prompt in enumerate(prompts, start=40):
        seeds = [seed]
        alone += sampled(model, prompt)
    assert len({len(tokens) for tokens in alone}) > 1, "no row has left before the others"
    seeds = list(range(40, 44))
    longest = max(map(len, alone))
    assert sampled(model, collate_prompts(prompts, 0)) == [tokens + [0] * (longest - len(tokens)) for tokens in alone]


def test_seeds_of_rows():
    assert row_seeds(7, 3) == [7, 8, 9] and row_seeds([4, 1], 2) == [4, 1]
    torch.manual_seed(5)
    drawn = row_seeds(None, 3), row_seeds(None, 3)
    torch.manual_seed(5)
    assert (row_seeds(None, 3), row_seeds(None, 3)) == drawn and drawn[0] != drawn[1]
    with pytest.raises(ValueError, match="seed has 2 entries, expected one for each of the 3 rows"):
        row_seeds([1, 2], 3)
    for wrong in ("7", 1.5, True, [1, None]):
        with pytest.raises(TypeError, match="seed must be an int or a list of ints"):
            row_seeds(wrong, 2)


def test_greedy_answers_draw_nothing():
    target = random_target("llava_1.5", 2, vocabulary=12)
    model = SpecModel(target, random_head(target, "eagle2", seed=3))
    before = torch.get_rng_state()
    model.specgenerate(**text_prompt(target, 4, seed=0), max_new_tokens=8)
    assert torch.equal(torch.get_rng_state(), before)
