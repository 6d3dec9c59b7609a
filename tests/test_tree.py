"""Trees, acceptance and the cache at B = 3, with rows of unequal length and depth, against plain Python."""

import copy
import logging

import pytest
import torch
from tiny_models import bare_head, random_head, random_target

from vispec import SpecModel
from vispec.model.acceptance import accept
from vispec.model.cache import TreeCache
from vispec.model.draft import DraftHead, DraftState
from vispec.model.draft_config import DraftConfig
from vispec.model.tree import Tree, TreeShape, choose_nodes, grow_tree

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


class Row:
    """One row of a draft state without cache and masks: all its layer inputs, in order."""

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
        x = torch.stack(self.inputs + further)[None]
        return self.head._layers(x, torch.arange(x.shape[1])[None], mask=None, cache=None)[0, -1]

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
    leaves = [path for node, path in enumerate(paths) if node not in parents]
    longest = max(map(len, leaves))
    assert tree.retrieve_indices(row).tolist() == [path + [-1] * (longest - len(path)) for path in leaves]


# --- growing ---


def unequal_states(head: DraftHead, seed: int) -> tuple[DraftState, list[Row]]:
    """A state at B = 3 whose rows have 6, 9 and 7 committed pairs, and the same rows for the oracle."""
    generator = torch.Generator().manual_seed(seed)

    def features(*shape):
        return torch.randn(*shape, SIZE, generator=generator)

    def ids(*shape):
        return torch.randint(VOCABULARY, shape, generator=generator)

    lm_head = torch.nn.Linear(SIZE, VOCABULARY, bias=False)
    lm_head.weight.data = features(VOCABULARY) * 0.1
    prompt, hidden, root = ids(3, 5), features(3, 5), ids(3)
    state = head.begin(hidden, head.embed_tokens(prompt), root, [[], [], []])
    rows = [Row(head, lm_head) for _ in range(3)]
    for b, row in enumerate(rows):
        if state.global_feature is not None:
            state.global_feature[b] = features()
            # what was read before the image did not know it
            row.global_feature = torch.zeros(SIZE)
        for token, feature in zip([*prompt[b, 1:].tolist(), int(root[b])], hidden[b], strict=True):
            row.commit(token, feature)
        if state.global_feature is not None:
            row.global_feature = state.global_feature[b]
    counts = torch.tensor([1, 4, 2])
    hidden, tokens = features(3, 4), ids(3, 4)
    head.extend(state, hidden, tokens, counts)
    for b, row in enumerate(rows):
        for step in range(int(counts[b])):
            row.commit(int(tokens[b, step]), hidden[b, step])
    return state, rows


@pytest.mark.parametrize(
    "shape", [TreeShape(2, 1, 1), TreeShape(8, 0, 7), TreeShape(12, 3, 4), TreeShape(30, 3, 8), TreeShape(60, 6, 10)]
)
@pytest.mark.parametrize("method", ["eagle2", "vispec"])
@torch.inference_mode()
def test_grown_trees_equal_the_oracle(method, shape):
    head = bare_head(CONFIG, method, seed=1)
    state, rows = unequal_states(head, seed=2)
    root = torch.tensor([3, 4, 5])
    tree = grow_tree(head, state, root, shape, rows[0].lm_head)
    assert state.cache.lengths.tolist() == [6, 9, 7]
    for b, row in enumerate(rows):
        torch.testing.assert_close(state.hidden[b], row.output([]), rtol=1e-4, atol=1e-4)
        check_tree(tree, b, brute_force_tree(row, int(root[b]), shape.total_token, shape.depth, shape.top_k), shape)
    if shape.total_token == 12:
        assert len({int(depths.max()) for depths in tree.depths}) > 1, "rows of unequal depth were wanted"


@torch.inference_mode()
def test_growing_leaves_the_committed_state_alone():
    head = bare_head(CONFIG, "vispec", seed=3)
    state, rows = unequal_states(head, seed=4)
    root, shape = torch.tensor([3, 4, 5]), TreeShape(12, 3, 4)
    first = grow_tree(head, state, root, shape, rows[0].lm_head)
    second = grow_tree(head, state, root, shape, rows[0].lm_head)
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.parents, second.parents)


# --- choosing ---


def test_a_child_that_ties_with_its_parent_comes_after_it():
    """Log-probabilities of 0 are common in half precision: then parent and child have one score."""
    shape = TreeShape(total_token=3, depth=1, top_k=2)
    # candidates: two of level 1, then the children of the first and of the second
    scores = torch.tensor([[-1.0, -2.0, -1.0, -9.0, -2.0, -9.0], [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0]])
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15]] * 2)
    parents = torch.tensor([[-1, -1, 0, 0, 1, 1]] * 2)
    tree = choose_nodes(torch.tensor([7, 8]), scores, tokens, parents, shape)
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
    tree = choose_nodes(torch.tensor([90, 91, 92]), scores, tokens, parents, shape)
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


# --- the cache ---


class NaiveCache:
    """Lists of vectors, one a layer and row."""

    def __init__(self, layers: int, batch: int):
        self.committed = [[[] for _ in range(batch)] for _ in range(layers)]
        self.provisional = copy.deepcopy(self.committed)


@pytest.mark.parametrize("seed", range(2))
def test_cache_equals_lists(seed):
    """Prompt, then rounds that keep another path in every row, through several moves to a larger cache."""
    generator = torch.Generator().manual_seed(seed)
    layers, batch, heads, head_dim, n, width = 2, 3, 2, 4, 6, 4
    cache = TreeCache([torch.device("cpu")] * layers, batch, capacity=8)
    naive = NaiveCache(layers, batch)

    def write(n: int) -> list[torch.Tensor]:
        seen = []
        for layer in range(layers):
            keys, values = (torch.randn(batch, heads, n, head_dim, generator=generator) for _ in range(2))
            visible_keys, visible_values = cache.update(keys, values, layer)
            for b in range(batch):
                naive.provisional[layer][b] += [torch.stack([keys[b, :, i], values[b, :, i]]) for i in range(n)]
            seen.append(torch.stack([visible_keys, visible_values]))
        return seen

    def check(seen: list[torch.Tensor], mask: torch.Tensor, ancestors: torch.Tensor) -> None:
        for layer in range(layers):
            for b in range(batch):
                for query in range(ancestors.shape[1]):
                    provisional = naive.provisional[layer][b]
                    expected = naive.committed[layer][b] + [
                        provisional[i] for i in range(ancestors.shape[2]) if ancestors[b, query, i]
                    ]
                    slots = (mask[b, 0, query] == 0).nonzero()[:, 0]
                    found = seen[layer][:, b][:, :, slots].permute(2, 0, 1, 3)
                    assert torch.equal(found, torch.stack(expected))

    def end_pass(chosen: list[list[int]]) -> None:
        for layer in range(layers):
            for b in range(batch):
                naive.committed[layer][b] += [naive.provisional[layer][b][i] for i in chosen[b]]
                naive.provisional[layer][b] = []

    # a prompt of 7 right-padded tokens
    prompt = [5, 7, 6]
    cache.reserve(7)
    write(7)
    cache.commit(torch.tensor(prompt))
    end_pass([list(range(length)) for length in prompt])

    for _ in range(90):
        if cache.used + n + 2 > cache.capacity:
            larger = cache.room_for(batch, cache.capacity + 32)
            larger.copy_(cache)
            cache = larger
        ancestors = torch.rand(batch, n, n, generator=generator).lt(0.5).tril() | torch.eye(n, dtype=torch.bool)
        cache.reserve(n)
        seen = write(n)
        mask = cache.mask(ancestors, torch.float32)
        assert mask.shape == (batch, 1, n, cache.used + n)
        check(seen, mask, ancestors)
        # a second pass of two tokens, which see each other and some of the first
        further = torch.rand(batch, 2, n + 2, generator=generator).lt(0.5)
        cache.reserve(2, offset=n)
        check(write(2), cache.mask(further, torch.float32), further)
        counts = torch.randint(1, width + 1, (batch,), generator=generator)
        kept = [[0, *sorted((torch.randperm(n - 1, generator=generator)[: int(c) - 1] + 1).tolist())] for c in counts]
        cache.keep(torch.tensor([path + [path[-1]] * (width - len(path)) for path in kept]))
        cache.commit(counts)
        cache.used = int(cache.lengths.max())
        end_pass(kept)
        assert cache.lengths.tolist() == [len(row) for row in naive.committed[0]]
    assert cache.capacity > 200


def test_a_path_wider_than_the_pass_stays_inside_the_buffer():
    cache = TreeCache([torch.device("cpu")], 1, capacity=2)
    with pytest.raises(ValueError, match="the cache has 2 slots, the pass needs 3"):
        cache.reserve(3)
    cache.reserve(2)
    keys = torch.arange(2.0).view(1, 1, 2, 1)
    visible, _ = cache.update(keys, keys, 0)
    cache.keep(torch.tensor([[0, 1, 1, 1, 1]]))
    assert visible.flatten().tolist() == [0.0, 1.0]


def test_a_pass_looks_at_the_slots_in_use_and_no_others():
    cache = TreeCache([torch.device("cpu")], 1, capacity=500)
    for n in (3, 4):
        cache.reserve(n)
        mask = cache.mask(torch.eye(n, dtype=torch.bool)[None], torch.float32)
        keys, values = cache.update(torch.ones(1, 2, n, 8), torch.ones(1, 2, n, 8), 0)
        cache.commit(torch.tensor([n]))
    assert mask.shape == (1, 1, 4, 7) and keys.shape == values.shape == (1, 2, 7, 8)
