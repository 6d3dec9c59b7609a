"""The cache at B = 3, with rows of unequal length, against plain Python."""

import copy

import pytest
import torch

from vispec.model.cache import TreeCache


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
            cache = cache.enlarged(cache.capacity + 32)
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
        cache.keep(torch.tensor([path[1:] + [path[-1]] * (width - len(path)) for path in kept]))  # the root stays
        cache.commit(counts)
        cache.used = int(cache.lengths.max())
        end_pass(kept)
        assert cache.lengths.tolist() == [len(row) for row in naive.committed[0]]
    assert cache.capacity > 200


def test_rows_move_and_caches_grow():
    """A row takes another's place, in all layers; a part writes into its own rows, also before anything was written."""
    cache = TreeCache([torch.device("cpu")] * 2, 3, capacity=4)
    generator = torch.Generator().manual_seed(0)
    written = torch.randn(3, 2, 2, 1, 2, 3, 4, generator=generator)  # row, layer, keys and values, 1, heads, n, D
    for b in (2, 0, 1):
        part = cache.part(b, b + 1)
        part.restart()
        part.reserve(3)
        for layer in range(2):
            part.write(layer, written[b, layer])
        part.commit(torch.tensor([b + 1]))
    cache.used = 3
    cache.move(2, 0)
    larger = cache.enlarged(9)
    assert larger.capacity == 9 and larger.used == 3 and larger.lengths.tolist() == [3, 2, 3]
    larger.reserve(1)
    for layer in range(2):
        keys, values = larger.write(layer, torch.ones(2, 3, 2, 1, 4))
        for b, source in enumerate((2, 1, 2)):
            length = int(larger.lengths[b])
            assert torch.equal(keys[b, :, :length], written[source, layer, 0, 0][:, :length])
            assert torch.equal(values[b, :, :length], written[source, layer, 1, 0][:, :length])
            assert bool((keys[b, :, length] == 1).all())
    larger.clear()
    assert larger.lengths.tolist() == [0, 0, 0] and larger.used == 0
    assert all(not buffer.any() for buffer in larger._buffers.values())


def test_a_pass_beyond_the_slots_is_refused():
    cache = TreeCache([torch.device("cpu")], 1, capacity=3)
    with pytest.raises(ValueError, match="the cache has 3 slots, the pass needs 4"):
        cache.reserve(4)
    cache.reserve(3)
    keys = torch.arange(3.0).view(1, 1, 3, 1)
    visible, _ = cache.update(keys, keys, 0)
    with pytest.raises(IndexError):
        cache.keep(torch.tensor([[2, 2, 2]]))
    cache.keep(torch.tensor([[2, 2]]))
    assert visible.flatten().tolist() == [0.0, 2.0, 2.0]


def test_a_pass_looks_at_the_slots_in_use_and_no_others():
    cache = TreeCache([torch.device("cpu")], 1, capacity=500)
    for n in (3, 4):
        cache.reserve(n)
        mask = cache.mask(torch.eye(n, dtype=torch.bool)[None], torch.float32)
        keys, values = cache.update(torch.ones(1, 2, n, 8), torch.ones(1, 2, n, 8), 0)
        cache.commit(torch.tensor([n]))
    assert mask.shape == (1, 1, 4, 7) and keys.shape == values.shape == (1, 2, 7, 8)


def test_layers_of_different_widths():
    """Layers with other heads, and keys and values of different widths, beside each other; a path is kept in all."""
    shapes = [((2, 4), (2, 4)), ((1, 8), (1, 8)), ((2, 4), (2, 4)), ((1, 6), (1, 2))]  # heads, size: of keys, of values
    generator = torch.Generator().manual_seed(0)
    whole = TreeCache([torch.device("cpu")] * len(shapes), 3, capacity=6)
    written = [[] for _ in shapes]

    def write(cache: TreeCache, n: int) -> None:
        cache.reserve(n)
        for layer, (key, value) in enumerate(shapes):
            states = [torch.randn(2, heads, n, size, generator=generator) for heads, size in (key, value)]
            seen = cache.update(*states, layer)
            written[layer].append(states)
            for kind, new in zip(seen, states, strict=True):
                assert torch.equal(kind[:, :, -n:], new)

    part = whole.part(1, 3)
    write(part, 3)
    part.commit(torch.tensor([3, 3]))
    part = whole.part(1, 3)
    part.used = 3
    write(part, 3)
    part.keep(torch.tensor([[2], [1]]))
    part.commit(torch.tensor([2, 2]))
    whole.used = 5
    larger = whole.enlarged(16)
    larger.move(1, 0)
    larger.reserve(1)
    for layer, (key, value) in enumerate(shapes):
        new = [torch.zeros(3, heads, 1, size) for heads, size in (key, value)]
        for kind, seen in enumerate(larger.update(*new, layer)):
            for row, kept in ((0, 2), (1, 2), (2, 1)):
                prompt, tree = (states[kind][max(row - 1, 0)] for states in written[layer])
                expected = torch.cat([prompt, tree[:, :1], tree[:, kept : kept + 1]], dim=1)
                assert torch.equal(seen[row, :, :5], expected)


def test_places_in_the_text():
    """Nodes stand where their depth puts them, whatever slot they have."""
    cache = TreeCache([torch.device("cpu")], 2, capacity=9)
    cache.lengths.copy_(torch.tensor([3, 5]))
    cache.used = 5
    cache.reserve(4)
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    chain = torch.ones(4, 4, dtype=torch.bool).tril()
    ancestors = torch.stack([tree, chain])
    cache.mask(ancestors, torch.float32)
    seeing, seen = cache.places(ancestors)
    assert seeing.tolist() == [[3, 4, 4, 5], [5, 6, 7, 8]]
    assert seen[0, :7].tolist() == [0, 1, 2, 3, 4, 4, 5] and seen[1].tolist() == list(range(9))
