"""Prompt lookup: the tree of plain Python, and lossless like the other methods."""

import pytest
import torch
from test_batches import batch_of
from test_sampling import WARM, V, check_sampled
from tiny_models import FAMILIES, ON_CPU, as_prompt, generate, greedy_lengths, image_prompt, random_target

from vispec import SpecModel
from vispec.model import decoding
from vispec.model.drafts import PromptLookup, lookup
from vispec.model.drafts.base import Kept
from vispec.model.drafts.lookup import LookupMemory
from vispec.model.shape import TreeShape
from vispec.model.tree import EMPTY, Tree, choose_nodes


def drafted_by_hand(text: list[int], total_token: int, k: int, levels: int) -> list[list[int]]:
    """The tokens on the way to each drafted node, in the order of the nodes."""
    matches = []
    for end in range(len(text) - 1):
        length = 0
        while length <= min(end, 7) and text[end - length] == text[len(text) - 1 - length] != EMPTY:
            length += 1
        if length:
            matches.append((length, end))
    nodes = {}
    for branch, (_, end) in enumerate(sorted(matches, reverse=True)[:k]):
        for level, token in enumerate(text[end + 1 : end + 1 + levels]):
            if token == EMPTY:
                break
            path = tuple(text[end + 1 : end + 2 + level])
            nodes.setdefault(path, (branch + level, branch * levels + level))
    best = sorted(nodes, key=lambda path: nodes[path])[: total_token - 1]
    return [list(path) for path in sorted(best, key=lambda path: nodes[path][1])]


def drafted(tree: Tree, row: int) -> list[list[int]]:
    lineages = zip(tree.paths[row].tolist(), tree.depths[row].tolist(), strict=True)
    paths = [[int(tree.tokens[row, node]) for node in path[1 : depth + 1]] for path, depth in lineages]
    return [path for path in paths[1:] if EMPTY not in path]


def read(draft: PromptLookup, prompt: torch.Tensor, root: torch.Tensor, images: list, capacity: int) -> LookupMemory:
    """What it remembers of prompts (B, L) and the token (B,) after each."""
    memory = draft.memory(len(prompt), capacity, ON_CPU)
    for row, spans in enumerate(images):
        one = as_prompt(None, None, spans, prompt[row : row + 1])
        memory.used = draft.read(memory.part(row, row + 1), one)
    draft.extend(memory, Kept(None, root[:, None], torch.ones_like(root)))
    return memory


@pytest.mark.parametrize("shape", [TreeShape(2, 0, 1), TreeShape(9, 2, 4), TreeShape(30, 3, 8), TreeShape(60, 1, 20)])
@pytest.mark.parametrize("seed", range(3))
def test_trees_equal_the_oracle(seed, shape):
    """Three texts that go on at different speeds, the first with an image; few tokens, so that much repeats itself."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*size):
        return torch.randint(3 + seed, size, generator=generator)

    draft = PromptLookup()
    shape = draft.fit(shape)
    prompt, root = ids(3, 9), ids(3)
    memory = read(draft, prompt, root, [[(2, 5)], [], []], capacity=40)
    texts = [[*row, last] for row, last in zip(prompt.tolist(), root.tolist(), strict=True)]
    texts[0][2:5] = [EMPTY] * 3
    for _ in range(6):
        tree = choose_nodes(root, draft.candidates(memory, shape), shape)
        assert tree.tokens.shape == (3, shape.total_token)
        for row, text in enumerate(texts):
            expected = drafted_by_hand(text, shape.total_token, shape.top_k, shape.levels)
            assert drafted(tree, row) == expected
            assert (tree.tokens[row] == EMPTY).sum() == shape.total_token - 1 - len(expected)
        tokens, counts = ids(3, 4), torch.tensor([1, 4, 2])
        draft.extend(memory, Kept(None, tokens, counts))
        for text, new, count in zip(texts, tokens.tolist(), counts.tolist(), strict=True):
            text += new[:count]
        root = tokens.gather(1, counts[:, None] - 1)[:, 0]
    assert memory.lengths.tolist() == [len(text) for text in texts]


@pytest.mark.parametrize("tree", [(2, 0, 1), (30, 3, 8)])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_the_targets(family, tree, monkeypatch):
    monkeypatch.setattr(lookup, "MOST_BRANCHES", 8)
    monkeypatch.setattr(decoding, "CAPACITY_AHEAD", 8)  # the text outgrows its buffer
    target = random_target(family, 2, vocabulary=9)
    model = SpecModel(target, PromptLookup(), *tree)
    lengths = greedy_lengths(model, (".", "a.bb."), 30)
    if tree[0] == 30:
        assert max(lengths) >= 2, "nothing was accepted, so nothing was tested"


def test_texts_of_a_batch_outgrow_their_buffers(monkeypatch):
    """Four texts of different lengths move to larger buffers several times; the first one ends on the way."""
    monkeypatch.setattr(lookup, "MOST_BRANCHES", 8)
    monkeypatch.setattr(decoding, "CAPACITY_AHEAD", 8)
    target = random_target("llava_next", 2, vocabulary=9)
    prompts = [image_prompt(target, seed, layout) for seed, layout in enumerate(("a.bb.", ".", ".a.", ".."))]
    first = generate(target, prompts[0], max_new_tokens=40)[0, prompts[0]["input_ids"].shape[1] :].tolist()
    target.generation_config.eos_token_id = first[6]
    expected = [generate(target, prompt, max_new_tokens=40) for prompt in prompts]
    batch, model = batch_of(prompts), SpecModel(target, PromptLookup(), 30, 3, 8)
    answer, accepted = model.specgenerate(**batch, max_new_tokens=40, return_acceptance_len=True)
    length = batch["input_ids"].shape[1]
    for row, (out, prompt) in enumerate(zip(expected, prompts, strict=True)):
        new = out[0, prompt["input_ids"].shape[1] :]
        assert torch.equal(answer[row, length : length + len(new)], new)
    assert max(max(lengths, default=0) for lengths in accepted) >= 2, "nothing was accepted, so nothing was tested"


def test_sampled_answers_follow_the_target():
    target = random_target("llava_1.5", seed=11, vocabulary=V, std=0.15)
    model = SpecModel(target, PromptLookup(), total_token=9, depth=1, top_k=4)
    prompt = torch.randint(V - 1, (1, 30), generator=torch.Generator().manual_seed(1))  # every token but the image's
    check_sampled(model, prompt, WARM)


def test_takes_no_draft_head():
    with pytest.raises(ValueError, match="spec_model_path somewhere: method 'lookup' has no draft head"):
        SpecModel.from_pretrained("nowhere", "somewhere", method="lookup")
    shape = PromptLookup().fit(TreeShape(60, 1, 20))
    assert shape == TreeShape(41, 1, 20), "20 branches of two tokens"


def test_a_tree_has_no_more_branches_than_a_text_has_slots():
    draft = PromptLookup()
    shape = draft.fit(TreeShape(4000, 1, 900))
    assert (shape.total_token, shape.top_k) == (2 * lookup.MOST_BRANCHES + 1, lookup.MOST_BRANCHES)
    root = torch.tensor([5])
    memory = read(draft, torch.tensor([[5, 6, 7]]), root, [[]], capacity=4)
    assert drafted(choose_nodes(root, draft.candidates(memory, shape), shape), 0) == [[6], [6, 7]]
