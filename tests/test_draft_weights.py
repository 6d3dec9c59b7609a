"""A draft head that has drafted is still an ordinary module: saved, copied, trained, put into adapters."""

import copy
import pickle

import pytest
import torch
from lean_targets import LowRank, assert_exact, assert_same_tensors, storages, tensors_of
from tiny_models import image_prompt, random_head, random_target
from torch import nn

from vispec import SpecModel
from vispec.model.drafts import BaseHead

METHODS = ("vispec", "eagle2", "medusa")


def pair(method: str) -> SpecModel:
    vlm = random_target("llava_next", 3)
    return SpecModel(vlm, random_head(vlm, method, seed=7), total_token=8, depth=2, top_k=3)


def drafted(model: SpecModel) -> list[int]:
    """How many draft tokens each round of an answer accepted: what the head says, as the answer shows it."""
    prompt = image_prompt(model.target.model, 0, ".a.")
    return model.specgenerate(**prompt, max_new_tokens=24, return_acceptance_len=True)[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_head_that_has_drafted_is_saved_copied_and_pickled_whole(method, tmp_path):
    model = pair(method)
    head = model.draft
    before, held = tensors_of(head), sum(storages(head).values())
    expected = drafted(model)
    assert_same_tensors(head.state_dict(), before)
    assert sum(storages(head).values()) == held
    head.save_pretrained(tmp_path)
    copies = [BaseHead.from_pretrained(str(tmp_path)), copy.deepcopy(head), pickle.loads(pickle.dumps(head))]
    for other in copies:
        assert_same_tensors(other.state_dict(), before)
        assert not storages(other).keys() & storages(head).keys()
        assert drafted(SpecModel(model.target, other, total_token=8, depth=2, top_k=3)) == expected


@pytest.mark.parametrize("kernel", ["linear", "onednn"])
@pytest.mark.parametrize("method", METHODS)
def test_a_head_that_is_trained_on_drafts_by_its_new_weights(method, kernel, kernels):
    kernels(kernel)
    model, other = pair(method), pair(method)
    drafted(model)
    for head in (model.draft, other.draft):
        optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=0.1)
        hidden = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
        out = head(hidden) if method == "medusa" else head(hidden, hidden, hidden, [[]])
        (out - hidden[..., :1, :1]).square().mean().backward()
        optimizer.step()
    assert_same_tensors(model.draft.state_dict(), other.draft.state_dict())
    assert drafted(model) == drafted(SpecModel(model.target, other.draft, total_token=8, depth=2, top_k=3))


@pytest.mark.parametrize("method", METHODS)
def test_a_head_with_an_adapter_drafts_by_its_own_layers(method):
    torch.manual_seed(0)
    model = pair(method)
    drafted(model)
    owner, name = {"medusa": lambda h: (h.medusa_head[0][0], "linear")}.get(method, lambda h: (h, "fc"))(model.draft)
    adapter = LowRank(getattr(owner, name))
    nn.init.normal_(adapter.up.weight)
    setattr(owner, name, adapter)
    stock = SpecModel(model.target.model, copy.deepcopy(model.draft), total_token=8, depth=2, top_k=3, fast=False)
    assert drafted(model) == drafted(stock)
    assert_exact(model)
