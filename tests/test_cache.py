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
