"""Medusa's heads: the same tree, verification and files as the other methods, and lossless like them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tree import CONFIG, SIZE, VOCABULARY, check_tree, tree_of
from tiny_models import (
    FAMILIES,
    ON_CPU,
    bare_head,
    greedy_lengths,
    output_of,
    random_head,
    random_target,
    read_rows,
)

from vispec import SpecModel
from vispec.model.drafts import MedusaHead, load_draft
from vispec.model.drafts.base import Kept
from vispec.model.drafts.checkpoints import save_draft
from vispec.model.shape import TreeShape
from vispec.model.tree import choose_nodes

# --- the tree ---


def brute_force_tree(log_probs: torch.Tensor, root: int, total_token: int, k: int) -> dict:
    """The chosen nodes of a tree whose level j is written from row j of (heads, V) log-probabilities."""
    best = [list(zip(*(x.tolist() for x in row.topk(k)), strict=True)) for row in log_probs]
    candidates = [(score, token, None) for score, token in best[0]]
    frontier = list(range(k))
    for level in best[1:]:
        created = []
        for index in frontier:
            for log_prob, token in level:
                created.append(len(candidates))
                candidates.append((candidates[index][0] + log_prob, token, index))
        frontier = sorted(created, key=lambda i: -candidates[i][0])[:k]
    chosen = sorted(range(len(candidates)), key=lambda i: -candidates[i][0])[: total_token - 1]
    return tree_of([(candidates[i][1], candidates[i][2], i) for i in sorted(chosen)], root)


@pytest.mark.parametrize(("total_token", "k"), [(2, 1), (9, 2), (30, 8), (41, 4)])
@torch.inference_mode()
def test_grown_trees_equal_the_oracle(total_token, k):
    """Three rows that committed different numbers of tokens; the depth that was asked for does not count."""
    head = bare_head(CONFIG, "medusa", seed=1)
    generator = torch.Generator().manual_seed(2)
    lm_head = torch.nn.Linear(SIZE, VOCABULARY, bias=False)
    lm_head.weight.data = torch.randn(VOCABULARY, SIZE, generator=generator) * 0.1
    root, counts = torch.tensor([3, 4, 5]), torch.tensor([1, 4, 2])
    prompt, path = torch.randn(3, 5, SIZE, generator=generator), torch.randn(3, 4, SIZE, generator=generator)
    memory = head.memory(3, 20, ON_CPU)
    read_rows(head, memory, prompt, prompt, root, [[], [], []])
    shape = TreeShape(total_token, 1, k).fitted(VOCABULARY, head.fixed_depth)
    assert shape.levels == 5
    for features in (prompt[:, -1], path[torch.arange(3), counts - 1]):
        tree = choose_nodes(root, head.candidates(memory, shape, output_of(lm_head)), shape)
        for b, feature in enumerate(features):
            linears = [(block[0].linear.weight, block[0].linear.bias) for block in head.medusa_head]
            outs = [feature + torch.nn.functional.silu(weight @ feature + bias) for weight, bias in linears]
            log_probs = lm_head(torch.stack(outs)).log_softmax(-1)
            check_tree(tree, b, brute_force_tree(log_probs, int(root[b]), shape.total_token, k), shape)
        head.extend(memory, Kept(path, torch.zeros(3, 4, dtype=torch.long), counts))


# --- lossless ---


@pytest.mark.parametrize("tree", [(2, 1, 1), (30, 0, 8)])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_the_targets(family, tree):
    target = random_target(family, 2, vocabulary=9)
    model = SpecModel(target, random_head(target, "medusa", seed=3), *tree)
    lengths = greedy_lengths(model, (".", ".a.", "a.bb."), 20)
    if tree[0] == 30:
        assert max(lengths) >= 2, "nothing was accepted, so nothing was tested"


# --- files ---


@pytest.fixture
def folder(tmp_path):
    save_draft(bare_head(CONFIG, "medusa", seed=4), tmp_path / "head")
    return tmp_path / "head"


def test_names_and_round_trip(folder):
    written = load_file(folder / "model.safetensors")
    names = {f"medusa_head.{j}.0.linear.{part}" for j in range(5) for part in ("weight", "bias")}
    assert written.keys() == names | {"embed_tokens.weight"}
    for method in (None, "medusa"):
        head = load_draft(str(folder), method)
        assert head.method == "medusa"
        assert all(torch.equal(tensor, written[name]) for name, tensor in head.state_dict().items())
        assert not head.embed_tokens.weight.requires_grad
    fresh = MedusaHead(CONFIG)
    feature = torch.randn(2, SIZE)
    assert torch.equal(fresh(feature), feature[:, None].expand(-1, 5, -1)), "the linear layers start at zero"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("medusa_head.2.0.linear.bias", None, "missing tensor"),
        ("medusa_head.1.0.linear.weight", torch.zeros(2, 2), "has shape"),
        ("fc.weight", torch.zeros(2, 2), "unexpected tensor"),
        ("medusa_head.1.1.linear.weight", torch.zeros(2, 2), "unexpected tensor"),
    ],
)
def test_wrong_tensors_are_named(folder, name, tensor, message):
    weights = load_file(folder / "model.safetensors")
    weights.pop(name, None)
    if tensor is not None:
        weights[name] = tensor
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors: .*{message}|{name} {message}") as caught:
        load_draft(str(folder))
    assert name in str(caught.value)


def test_another_method_is_refused(folder):
    with pytest.raises(ValueError, match="these are medusa weights, method 'eagle2' was asked for"):
        load_draft(str(folder), "eagle2")
