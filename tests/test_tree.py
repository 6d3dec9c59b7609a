"""Trees and acceptance at B = 3, with rows of unequal length and depth, against plain Python."""

import logging

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ON_CPU, bare_head, output_of, random_head, random_target, read_rows

from vispec import SpecModel
from vispec.model.drafts import DraftHead
from vispec.model.drafts.base import Kept
from vispec.model.drafts.config import DraftConfig
from vispec.model.drafts.pair_head import DraftMemory
from vispec.model.sampling import accept
from vispec.model.shape import TreeShape
from vispec.model.tree import Candidates, Tree, choose_nodes

SIZE, VOCABULARY = 32, 20
CONFIG = DraftConfig(
    hidden_size=SIZE,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    rms_norm_eps=1e-5,
)


# --- the oracle: EAGLE-2's tree of one row, node by node ---


def run_layer(head: DraftHead, x: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """The decoder layer over (R, H), every query on its own."""
    layer, config = head.layers[0], head.config
    attention, size = layer.self_attn, config.head_dim
    groups = config.num_attention_heads // config.num_key_value_heads
    frequencies = config.rope_theta ** -(torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.tensor(positions, dtype=torch.float32), frequencies).repeat(1, 2)

    def split(projected):
        return projected.view(len(x), -1, size).transpose(0, 1)

    def turn(states):
        first, second = states.chunk(2, dim=-1)
        return states * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    q, k, v = turn(split(attention.q_proj(x))), turn(split(attention.k_proj(x))), split(attention.v_proj(x))
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    rows = []
    for i in range(len(x)):
        weights = (q[:, i : i + 1] @ k[:, : i + 1].transpose(1, 2) / size**0.5).softmax(-1)
        rows.append((weights @ v[:, : i + 1]).flatten())
    y = x + attention.o_proj(torch.stack(rows))
    normed = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
    normed = normed * layer.post_attention_layernorm.weight
    mlp = layer.mlp
    return y + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


class Row:
    """One row of a draft's memory without cache and masks: all its layer inputs, in order."""

    def __init__(self, head: DraftHead, lm_head: torch.nn.Linear):
        self.head, self.lm_head = head, lm_head
        self.inputs: list[torch.Tensor] = []
        self.global_feature: torch.Tensor | None = None

    def pair(self, token: int, feature: torch.Tensor) -> torch.Tensor:
        g = None if self.global_feature is None else self.global_feature[None]
        return self.head.fuse(self.head.embed_tokens(torch.tensor([[token]])), feature.view(1, 1, -1), g)[0, 0]

    def commit(self, token: int, feature: torch.Tensor) -> None:
        self.inputs.append(self.pair(token, feature))

    def output(self, further: list[torch.Tensor]) -> torch.Tensor:
        """The head's output at the last of the committed and the given pairs."""
        x = torch.stack(self.inputs + further)
        return run_layer(self.head, x, list(range(len(x))))[-1]

    def best(self, hidden: torch.Tensor, k: int) -> list[tuple[float, int]]:
        values, tokens = self.lm_head(hidden).log_softmax(-1).topk(k)
        return list(zip(values.tolist(), tokens.tolist(), strict=True))


def brute_force_tree(row: Row, root: int, total_token: int, depth: int, k: int) -> dict:
    """Tokens, parents and depths of the chosen nodes, as in the paper on EAGLE-2."""
    # a candidate: score, token, parent candidate, the pairs on its path, the head's output at its parent
    estimate = row.output([])
    candidates = [(score, token, None, [], estimate) for score, token in row.best(estimate, k)]
    frontier = list(range(k))
    for _ in range(depth):
        created = []
        for index in frontier:
            score, token, _, path, parent_output = candidates[index]
            pairs = [*path, row.pair(token, parent_output)]
            output = row.output(pairs)
            for log_prob, child in row.best(output, k):
                created.append(len(candidates))
                candidates.append((score + log_prob, child, index, pairs, output))
        frontier = sorted(created, key=lambda i: -candidates[i][0])[:k]
    best = sorted(range(len(candidates)), key=lambda i: -candidates[i][0])[: total_token - 1]
    return tree_of([(candidates[i][1], candidates[i][2], i) for i in sorted(best)], root)


def tree_of(chosen: list[tuple[int, int | None, int]], root: int) -> dict:
    """From (token, parent candidate, candidate) in order of creation."""
    node_of = {None: 0}
    tokens, parents = [root], [0]
    for token, parent, candidate in chosen:
        assert parent in node_of, "a chosen node's parent is chosen"
        node_of[candidate] = len(tokens)
        tokens.append(token)
        parents.append(node_of[parent])
    return {"tokens": tokens, "parents": parents}


def path_to(parents: list[int], node: int) -> list[int]:
    path = [node]
    while path[0] != 0:
        path.insert(0, parents[path[0]])
    return path


def check_tree(tree: Tree, row: int, expected: dict, shape: TreeShape) -> None:
    parents = expected["parents"]
    n = len(parents)
    assert tree.tokens[row].tolist() == expected["tokens"]
    assert tree.parents[row].tolist() == parents
    paths = [path_to(parents, node) for node in range(n)]
    assert tree.mask[row].tolist() == [[other in path for other in range(n)] for path in paths]
    assert tree.depths[row].tolist() == [len(path) - 1 for path in paths]
    width = shape.levels + 1
    assert tree.paths[row].tolist() == [path + path[-1:] * (width - len(path)) for path in paths]


# --- growing ---


def unequal_memory(head: DraftHead, seed: int) -> tuple[DraftMemory, list[Row]]:
    """A memory at B = 3 whose rows have 6, 9 and 7 committed pairs, and the same rows for the oracle."""
    generator = torch.Generator().manual_seed(seed)

    def features(*shape):
        return torch.randn(*shape, SIZE, generator=generator)

    def ids(*shape):
        return torch.randint(VOCABULARY, shape, generator=generator)

    lm_head = torch.nn.Linear(SIZE, VOCABULARY, bias=False)
    lm_head.weight.data = features(VOCABULARY) * 0.1
    prompt, hidden, root = ids(3, 5), features(3, 5), ids(3)
    memory = head.memory(3, 80, ON_CPU)
    read_rows(head, memory, hidden, head.embed_tokens(prompt), root, [[], [], []])
    rows = [Row(head, lm_head) for _ in range(3)]
    for b, row in enumerate(rows):
        if head.method == "vispec":
            memory.global_feature[b] = features()
            # what was read before the image did not know it
            row.global_feature = torch.zeros(SIZE)
        for token, feature in zip([*prompt[b, 1:].tolist(), int(root[b])], hidden[b], strict=True):
            row.commit(token, feature)
        if head.method == "vispec":
            row.global_feature = memory.global_feature[b]
    counts = torch.tensor([1, 4, 2])
    hidden, tokens = features(3, 4), ids(3, 4)
    head.extend(memory, Kept(hidden, tokens, counts))
    for b, row in enumerate(rows):
        for step in range(int(counts[b])):
            row.commit(int(tokens[b, step]), hidden[b, step])
    return memory, rows


def grown(head: DraftHead, memory: DraftMemory, root: torch.Tensor, shape: TreeShape, rows: list[Row]) -> Tree:
    return choose_nodes(root, head.candidates(memory, shape, output_of(rows[0].lm_head)), shape)


@pytest.mark.parametrize(
    "shape", [TreeShape(2, 1, 1), TreeShape(8, 0, 7), TreeShape(12, 3, 4), TreeShape(30, 3, 8), TreeShape(60, 6, 10)]
)
@pytest.mark.parametrize("method", ["eagle2", "vispec"])
@torch.inference_mode()
def test_grown_trees_equal_the_oracle(method, shape):
    head = bare_head(CONFIG, method, seed=1)
    memory, rows = unequal_memory(head, seed=2)
    root = torch.tensor([3, 4, 5])
    tree = grown(head, memory, root, shape, rows)
    assert memory.cache.lengths.tolist() == [6, 9, 7]
    for b, row in enumerate(rows):
        torch.testing.assert_close(memory.estimate[b], row.output([]), rtol=1e-4, atol=1e-4)
        check_tree(tree, b, brute_force_tree(row, int(root[b]), shape.total_token, shape.depth, shape.top_k), shape)
    if shape.total_token == 12:
        assert len({int(depths.max()) for depths in tree.depths}) > 1, "rows of unequal depth were wanted"


@torch.inference_mode()
def test_growing_leaves_what_was_read_alone():
    head = bare_head(CONFIG, "vispec", seed=3)
    memory, rows = unequal_memory(head, seed=4)
    root, shape = torch.tensor([3, 4, 5]), TreeShape(12, 3, 4)
    first = grown(head, memory, root, shape, rows)
    second = grown(head, memory, root, shape, rows)
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.parents, second.parents)


# --- choosing ---


def test_a_child_that_ties_with_its_parent_comes_after_it():
    """Log-probabilities of 0 are common in half precision: then parent and child have one score."""
    shape = TreeShape(total_token=3, depth=1, top_k=2)
    # candidates: two of level 1, then the children of the first and of the second
    scores = torch.tensor([[-1.0, -2.0, -1.0, -9.0, -2.0, -9.0], [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0]])
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15]] * 2)
    parents = torch.tensor([[-1, -1, 0, 0, 1, 1]] * 2)
    tree = choose_nodes(torch.tensor([7, 8]), Candidates(scores, tokens, parents), shape)
    check_tree(tree, 0, {"tokens": [7, 10, 12], "parents": [0, 0, 1]}, shape)
    check_tree(tree, 1, {"tokens": [8, 10, 11], "parents": [0, 0, 0]}, shape)


@pytest.mark.parametrize("total_token", [2, 5, 16, 39])
def test_many_ties_never_orphan_a_node(total_token):
    """Scores from three values only: the chosen ones are the best, and every parent is among them."""
    generator = torch.Generator().manual_seed(total_token)
    shape = TreeShape(total_token, depth=4, top_k=3)
    k, candidates = shape.top_k, shape.candidates
    parents = torch.full((3, candidates), -1)
    scores = torch.randint(-1, 1, (3, candidates), generator=generator).float()
    for b in range(3):
        for i in range(k, candidates):
            level, rank = divmod(i - k, k * k)
            first = 0 if level == 0 else k + (level - 1) * k * k
            size = k if level == 0 else k * k
            # as growing does it: the k best of the level before are expanded, in their order
            frontier = (scores[b, first : first + size].sort(descending=True, stable=True).indices + first)[:k]
            parents[b, i] = frontier[rank // k]
            scores[b, i] += scores[b, parents[b, i]]
    tokens = torch.arange(candidates).expand(3, -1)
    tree = choose_nodes(torch.tensor([90, 91, 92]), Candidates(scores, tokens, parents), shape)
    for b in range(3):
        order = sorted(range(candidates), key=lambda i: (-scores[b, i], i))[: total_token - 1]
        chosen = [(i, None if parents[b, i] < 0 else int(parents[b, i]), i) for i in sorted(order)]
        check_tree(tree, b, tree_of(chosen, 90 + b), shape)


def test_a_tree_that_cannot_be_filled_is_cut():
    assert TreeShape(100, 1, 3).fitted(50) == TreeShape(13, 1, 3)
    assert TreeShape(60, 6, 10).fitted(4) == TreeShape(60, 6, 4)
    assert TreeShape(60, 1, 10).fitted(4) == TreeShape(21, 1, 4)
    assert TreeShape(30, 3, 8).fitted(50) == TreeShape(30, 3, 8)


def test_one_notice_says_that_a_tree_was_cut(caplog):
    target = random_target("llava_1.5", seed=0, vocabulary=9)
    head = random_head(target, "eagle2", seed=0)
    with caplog.at_level(logging.WARNING, "vispec"):
        SpecModel(target, head, total_token=30, depth=3, top_k=8)
        assert not caplog.records
        model = SpecModel(target, head, total_token=60, depth=0, top_k=10)
        for _ in range(2):
            model.specgenerate(torch.tensor([[3, 4]]), max_new_tokens=4)
    assert [r.getMessage() for r in caplog.records] == [
        "a tree with total_token 60, depth 0 and top_k 10 cannot be filled, it is cut to total_token 10, top_k 9"
    ]


@pytest.mark.parametrize("shape", [TreeShape(30, 3, 8), TreeShape(2, 0, 1)])
def test_a_shape_has_one_spelling(shape):
    assert TreeShape.parse(str(shape)) == shape
    assert str(TreeShape(16, 7, 2)) == "16/7/2"


@pytest.mark.parametrize("text", ["", "30", "30/3", "30/3/8/1", "30/3/-8", "30/3/x", " 30/3/8", "30,3,8", "3e1/3/8"])
def test_other_spellings_are_refused(text):
    with pytest.raises(ValueError, match=f"^a tree is total_token/depth/top_k such as 30/3/8, found {text!r}$"):
        TreeShape.parse(text)


@pytest.mark.parametrize(
    ("text", "message"), [("1/3/8", "total_token must be at least 2, found 1"), ("30/3/0", "top_k must be at least 1")]
)
def test_impossible_trees_are_refused_as_texts_too(text, message):
    with pytest.raises(ValueError, match=message):
        TreeShape.parse(text)


@pytest.mark.parametrize(("name", "value"), [("total_token", 1), ("depth", -1), ("top_k", 0)])
def test_impossible_trees_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        TreeShape(**{name: value})


# --- accepting ---


def random_trees(seed: int, n: int, vocabulary: int) -> tuple[Tree, list[list[int]]]:
    """Three random trees whose siblings differ, the first a chain, the second flat."""
    generator = torch.Generator().manual_seed(seed)
    levels = n - 1
    parents = torch.zeros(3, n, dtype=torch.long)
    for node in range(1, n):
        parents[0, node] = node - 1
        parents[2, node] = torch.randint(node, (1,), generator=generator)
    parents[:, 1] = 0
    parents[2] = parents[2].sort().values
    tokens = torch.zeros(3, n, dtype=torch.long)
    for b in range(3):
        used: dict[int, list[int]] = {}
        for node in range(n):
            parent = int(parents[b, node])
            free = [t for t in range(vocabulary) if t not in used.get(parent, [])]
            tokens[b, node] = free[int(torch.randint(len(free), (1,), generator=generator))]
            if node:
                used.setdefault(parent, []).append(int(tokens[b, node]))
    paths = [[path_to(parents[b].tolist(), node) for node in range(n)] for b in range(3)]
    mask = torch.tensor([[[j in path for j in range(n)] for path in rows] for rows in paths])
    padded = torch.tensor([[path + path[-1:] * (levels + 1 - len(path)) for path in rows] for rows in paths])
    return Tree(tokens, parents, mask.sum(-1) - 1, mask, padded), parents.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_acceptance_walks_down_from_the_root(seed):
    n, vocabulary = 9, 10
    tree, parents = random_trees(seed, n, vocabulary)
    generator = torch.Generator().manual_seed(seed + 100)
    chosen = torch.randint(vocabulary, (3, n), generator=generator)
    for b in range(3):  # make hits likely: at most nodes the target names one of the children
        for node in range(n):
            children = [c for c in range(1, n) if parents[b][c] == node]
            if children and float(torch.rand(1, generator=generator)) < 0.85:
                pick = children[int(torch.randint(len(children), (1,), generator=generator))]
                chosen[b, node] = tree.tokens[b, pick]
    accepted = accept(tree, chosen)
    for b in range(3):
        node, path = 0, [0]
        while True:
            named = int(chosen[b, node])
            child = [c for c in range(1, n) if parents[b][c] == node and int(tree.tokens[b, c]) == named]
            if not child:
                break
            node = child[0]
            path.append(node)
        assert int(accepted.count[b]) == len(path) - 1
        assert accepted.path[b, : len(path)].tolist() == path
        assert accepted.path[b, len(path) :].tolist() == [node] * (n - len(path))
        assert accepted.tokens[b, : len(path)].tolist() == [int(chosen[b, p]) for p in path]
        assert int(accepted.root[b]) == int(chosen[b, node])
