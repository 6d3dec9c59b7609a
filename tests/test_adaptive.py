"""Trees that are grown by a rule: each rule against a restatement node by node, and every tree is lossless."""

import math
from functools import partial

import pytest
import torch
from test_batches import alone, batch_of, prompts_of
from test_batches import check as check_batch
from test_recurrent import model_of as recurrent_model
from test_recurrent import own, prompt_of
from test_rounds import answers
from test_sampling import sampled
from tiny_models import generate, image_prompt, random_head, random_target, recorded_model, same_target, text_prompt

from vispec import SpecModel
from vispec.evaluation.families.registry import FAMILIES
from vispec.model.adaptive import NOTES, RULES, AdaptiveTree, Ddd, Sage, Talon, Threshold, parse_tree
from vispec.model.drafts import PromptLookup
from vispec.model.shape import TreeShape
from vispec.model.tree import EMPTY, DraftOutput, Growth, Tree, choose_nodes, expand_levels

SIZE, VOCABULARY = 8, 24
TREES = ("threshold", "talon", "sage", "ddd", "talon:mu=0.3,n=12,d=3,k=4", "threshold:c=0.2,n=12,d=5,k=3")


# --- a draft whose estimates follow from a node's path alone ---


class PathDraft:
    """Rows begin with estimates (B, H) of their own; what follows is a function of parent's estimate and token."""

    def __init__(self, seed: int, rows: int, sharpness: float):
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator)
        self.start, self.turn, self.embed = draw(rows, SIZE), draw(SIZE, SIZE), draw(VOCABULARY, SIZE)
        self.head = draw(SIZE, VOCABULARY) * sharpness
        self.output = DraftOutput(lambda hidden: hidden @ self.head, lambda rows: None)

    def follow(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.tanh(hidden @ self.turn + self.embed[tokens])

    def grown(self, shape: AdaptiveTree, growth: Growth) -> Tree:
        def expand(hidden, tokens, parents):
            return self.follow(hidden, tokens)

        root = torch.zeros(len(self.start), dtype=torch.long)
        return choose_nodes(root, expand_levels(self.start[:, None], expand, shape, self.output, growth), shape)

    def best(self, hidden: torch.Tensor, k: int) -> list[tuple[float, int]]:
        values, tokens = (hidden @ self.head).log_softmax(-1).topk(k)
        return list(zip(values.tolist(), tokens.tolist(), strict=True))


def paths_of(tree: Tree, row: int) -> set[tuple[int, ...]]:
    """The token paths of all nodes that draft something."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    found = set()
    for node in range(1, len(tokens)):
        path, at = (), node
        while at:
            path, at = (tokens[at], *path), parents[at]
        if EMPTY not in path:
            found.add(path)
        else:
            assert tokens[node] == EMPTY, "a node below one that drafts nothing"
    return found


# --- the rules once more, in plain Python: nodes are (log-probability, path, parent's path, rank below the parent) ---


def chosen_threshold(tree, level, children, parents, left, memory):
    above = [n for n in children if math.exp(n[0]) > (tree.c or 1 / tree.total_token)]
    return children, [] if len(above) >= left else above


def chosen_talon(tree, level, children, parents, left, memory):
    least = -math.inf if level == 1 else math.log(tree.mu) + max(n[0] for n in children)
    kept = sorted((n for n in children if n[0] >= least), key=lambda n: -n[0])[:left]
    return kept, [] if len(kept) >= left else kept


def chosen_sage(tree, level, children, parents, left, memory):
    if memory["rounds"] == 0:
        widths = (4, 8, 8, 3, 2)
        kept = sorted(children, key=lambda n: -n[0])[: widths[level - 1] if level <= 5 else 0]
        return kept, kept if level < 5 and len(kept) < left else []
    alpha = memory["alpha"]
    depth = round(3 + alpha * (tree.depth + 1 - 3 - memory["shrunk"]))
    width = 2 + (1 - alpha) * 8
    kept = []
    for score, path, parent, rank in children:
        wide = width if level == 1 else width / level * (0.5 + math.exp(parents[parent]))
        if rank < max(1, round(wide)) and math.exp(score) > 0.1 * level / depth and level <= depth:
            kept.append((score, path, parent, rank))
    return kept, kept if level < depth and len(kept) < left else []


def chosen_ddd(tree, level, children, parents, left, memory):
    frontier = sorted((n[0] for n in children), reverse=True)[: tree.top_k]
    stops = level in (5, 7, 9) and math.log(sum(map(math.exp, frontier))) < tree.c
    return children, [] if stops else children


def brute_force(draft: PathDraft, row: int, tree: AdaptiveTree, memory: dict) -> tuple[set[tuple[int, ...]], int]:
    """The paths of a row's nodes, and how many levels it needs."""
    rule = {Threshold: chosen_threshold, Talon: chosen_talon, Sage: chosen_sage, Ddd: chosen_ddd}[type(tree)]
    estimates, scores = {(): draft.start[row]}, {(): 0.0}
    frontier, nodes, left, level = [()], [], tree.total_token - 1, 0
    while frontier and level < tree.levels:
        level += 1
        children = [
            (scores[parent] + log_prob, (*parent, token), parent, rank)
            for parent in frontier
            for rank, (log_prob, token) in enumerate(draft.best(estimates[parent], tree.top_k))
        ]
        kept, expanded = rule(tree, level, children, scores, left, memory)
        nodes += kept
        left -= len(expanded)
        frontier = []
        for score, path, parent, _ in sorted(expanded, key=lambda n: -n[0])[: tree.top_k]:
            scores[path], estimates[path] = score, draft.follow(estimates[parent], torch.tensor(path[-1]))
            frontier.append(path)
    best = sorted(nodes, key=lambda n: -n[0])[: tree.total_token - 1]
    return {path for _, path, _, _ in best}, level


@pytest.mark.parametrize("sharpness", [0.5, 1.5, 4.0])
@pytest.mark.parametrize(
    "tree",
    [
        Threshold(), Threshold(20, 6, 4), Threshold(c=0.2), Talon(), Talon(mu=0.3), Talon(12, 4, 5, mu=0.1), Sage(),
        Sage(20, 5, 6), Ddd(), Ddd(30, 8, 4, c=-0.01), Ddd(30, 8, 4, c=-3.0),
    ],
    ids=str,
)  # fmt: skip
def test_a_tree_is_what_its_rule_says(tree, sharpness):
    """Three rows in one tensor; for SAGE a first round, and rounds after one that was unsure, and after a sure one."""
    for seed in range(4):
        draft = PathDraft(seed, 3, sharpness)
        memories = [{"rounds": 0}, {"rounds": 3, "alpha": 0.2, "shrunk": 1}, {"rounds": 9, "alpha": 0.9, "shrunk": 0}]
        if type(tree) is not Sage:
            memories = [{}] * 3
        notes = torch.zeros(3, NOTES)
        for row, memory in enumerate(memories):
            notes[row, [Sage.ROUNDS, Sage.LAST_ALPHA, Sage.SHRUNK]] = torch.tensor(
                [memory.get(name, 0) for name in ("rounds", "alpha", "shrunk")], dtype=torch.float
            )
        growth = Growth(notes)
        grown = draft.grown(tree, growth)
        expected = [brute_force(draft, row, tree, memory) for row, memory in enumerate(memories)]
        assert grown.tokens.shape == (3, tree.total_token)
        for row, (paths, _) in enumerate(expected):
            assert paths_of(grown, row) == paths
            assert (grown.tokens[row, 1:] != EMPTY).sum() == len(paths) < tree.total_token
        assert growth.levels == max(levels for _, levels in expected), "as many as the row that needs the most"


def test_how_sure_a_draft_is():
    tree = Sage(top_k=4)
    assert tree.alpha(torch.zeros(1, 4)).item() == pytest.approx(0, abs=1e-6)
    assert tree.alpha(torch.tensor([[0.0, -50, -50, -50]])).item() == pytest.approx(1)
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    for rest in (1.0, 0.3):  # renormalised: what the k best have not is left out
        assert tree.alpha((p * rest).log()[None]).item() == pytest.approx(1 - 1.75 * math.log(2) / math.log(4))
    assert Sage(top_k=1).alpha(torch.tensor([[-2.0]])).item() == 1


def test_what_sage_learns_from_round_to_round():
    tree, notes, history, shrunk = Sage(), torch.zeros(1, NOTES), [], 0
    for number, accepted in enumerate([0, 0, 1, 4, 2, 0, 0, 0, 3, 3, *[7] * 25, *[0] * 25]):
        notes[:, Sage.ALPHA] = number / 100
        tree.learn(notes, torch.tensor([accepted]))
        history = [*history, accepted][-10:]
        mean = sum(history) / len(history)
        shrunk = min(max(shrunk + (mean < 2) - (mean > 3), 0), 5)
        assert notes[0, Sage.SHRUNK] == shrunk and notes[0, Sage.ROUNDS] == number + 1
        assert notes[0, Sage.LAST_ALPHA].item() == pytest.approx(number / 100)
    assert shrunk == 5 and tree.planned_depth(notes).item() == 3


# --- lossless ---


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(("family", "method"), [("llava_next", "vispec")])
def test_answers_are_those_of_generate(family, method, tree):
    recorded = recorded_model(family, method)
    model, lengths = SpecModel(recorded.target.model, recorded.draft, tree=tree), []
    for seed, layout in enumerate((".", "a.bb.")):
        inputs = image_prompt(recorded.target.model, seed, layout)
        answer, accepted = model.specgenerate(**inputs, max_new_tokens=32, return_acceptance_len=True)
        assert torch.equal(answer, generate(recorded.target.model, inputs, max_new_tokens=32))
        lengths += accepted
    assert sum(lengths) > 0, "nothing was accepted, so nothing was tested"


@pytest.mark.parametrize(
    ("family", "method", "tree"),
    [
        ("llava_next", "vispec", "sage"),
        ("qwen2_5_vl", "vispec", "ddd"),
        ("qwen2_vl", "eagle3", "talon:mu=0.3,n=12,d=3,k=4"),
        ("llava_1.5", "msd", "threshold:c=0.2,n=12,d=5,k=3"),
    ],
)
def test_rows_of_a_batch_have_the_trees_that_they_have_alone(family, method, tree):
    """Which rows accept how much, and what is remembered of them, follows them when others end."""
    target = same_target(random_target(family, 2, vocabulary=12))
    prompts = prompts_of(target)
    model = SpecModel(target, random_head(target, method, 3), tree=tree)
    target.generation_config.eos_token_id = alone(model, prompts[0], "baseline_generate", max_new_tokens=16)[0][4]
    model = SpecModel(target, random_head(target, method, 3), tree=tree)
    single = check_batch(model, prompts, "specgenerate", max_new_tokens=16)
    assert [tokens for tokens, _ in single] == [
        alone(model, prompt, "baseline_generate", max_new_tokens=16)[0] for prompt in prompts
    ]


@pytest.mark.parametrize("tree", TREES)
def test_a_seed_says_the_same_as_without_a_tree(tree):
    target = random_target("qwen2_5_vl", 2, vocabulary=12, std=0.1)
    model = SpecModel(target, random_head(target, "vispec", seed=3), tree=tree)
    inputs = image_prompt(target, 1, ".a.b")
    for seed in (1, 2):
        assert sampled(model, inputs, seed=seed) == sampled(model, inputs, "baseline_generate", seed)


@pytest.mark.parametrize(("tree", "rows"), [("talon:mu=0.3,n=12,d=3,k=4", 1), ("sage:n=12,d=3,k=4", 2)])
def test_captured_levels(captures, eager, tree, rows):
    """Each level is a step, after the warm-up a captured one, whichever levels a round has."""
    target = random_target("llava_1.5", 0, vocabulary=12)
    prompts = [text_prompt(target, 5 + row, seed=row) for row in range(rows)]
    model = SpecModel(target, random_head(target, "vispec", 3), tree=tree)
    model.warmup(5, 30, rows=rows)
    assert {key[2][3] for key in captures if key[0] == "level"} == {0, 1, 2, 3} and model.captured == "all"
    eager.clear()
    spec, accepted, plain, _ = answers(model, batch_of(prompts), max_new_tokens=28)
    assert spec == plain and len(accepted) > 0
    assert {key for key in eager if key[1] == rows} == set(), "not all was captured"


# --- what was asked for ---


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("30/3/8", TreeShape(30, 3, 8)),
        ("talon", Talon(60, 8, 10, 0.03)),
        ("talon:mu=0.04,n=40", Talon(40, 8, 10, 0.04)),
        ("threshold:c=0.1,n=20,d=5,k=4", Threshold(20, 5, 4, 0.1)),
        ("sage:k=4", Sage(65, 7, 4)),
        ("ddd:c=-0.5", Ddd(60, 10, 10, -0.5)),
    ],
)
def test_a_tree_has_one_spelling(text, tree):
    assert parse_tree(text) == tree and type(parse_tree(text)) is type(tree)
    assert parse_tree(str(tree)) == tree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best", "a tree is total_token/depth/top_k such as 30/3/8, or one of threshold, .*, found 'best'"),
        ("talon:c=1", "a talon tree takes n, d, k, mu, each once as NAME=VALUE, found 'c=1'"),
        ("talon:mu=0.1,mu=0.2", "each once as NAME=VALUE, found 'mu=0.2'"),
        ("talon:", "each once as NAME=VALUE, found ''"),
        ("talon:mu=x", "talon: expected a number for mu, found 'x'"),
        ("talon:n=1.5", "talon: expected a whole number for n, found '1.5'"),
        ("talon:mu=2", "talon: mu must lie between 0 and 1, found 2"),
        ("ddd:c=nan", "c must be a finite number"),
        ("sage:n=1", "total_token must be at least 2, found 1"),
    ],
)  # fmt: skip
def test_other_spellings_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_tree(text)


def test_a_largest_tree_is_cut_to_what_the_draft_can_fill():
    target = random_target("llava_1.5", 0, vocabulary=9)
    model = SpecModel(target, random_head(target, "eagle2", 0), tree="talon:mu=0.1,d=0")
    assert model.shape == Talon(10, 0, 9, 0.1)


@pytest.mark.parametrize("method", ["medusa", "lookup"])
def test_drafts_that_have_no_levels_are_refused(method):
    target = random_target("llava_1.5", 0)
    draft = PromptLookup() if method == "lookup" else random_head(target, method, 0)
    with pytest.raises(ValueError, match=f"{method} drafts all levels in one go, so a talon tree leaves nothing out"):
        SpecModel(target, draft, tree="talon")


@pytest.mark.parametrize("name", list(RULES))
def test_a_target_that_follows_chains_alone(name):
    """It is told which chain; the rule then decides how long it is."""
    family = "lfm2_vl"
    model = recurrent_model(family)
    with pytest.raises(
        ValueError, match=f"the branches of the tree {name}:.*give a chain, such as {name}:.*k=1, or auto"
    ):
        SpecModel(model, tree=name)
    prompt = prompt_of(FAMILIES[family], model, ".a.b.", 0)
    spec = SpecModel(model, random_head(model, "eagle2", 0), tree=f"{name}:k=1,n=6,d=4")
    assert spec.specgenerate(**prompt, max_new_tokens=24).tolist() == own(model, prompt, max_new_tokens=24).tolist()
