"""Drafts followed from all pairs at once are the drafts of the decoder."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tiny_models import as_prompt
from torch.utils._python_dispatch import TorchDispatchMode

from vispec.model.drafts import DraftHead, ViSpecHead
from vispec.model.drafts.base import Kept
from vispec.model.drafts.config import DraftConfig
from vispec.model.shape import TreeShape
from vispec.model.tree import DraftOutput
from vispec.train import chain
from vispec.train.chain import count_in_a_row, draft_chain, drafted_in_a_row, shift_left

SIZE, LENGTH, DEPTH = 32, 20, 4


def make_head(method: str) -> DraftHead:
    torch.manual_seed(0)
    config = DraftConfig(SIZE, 48, 4, 2 if method == "eagle2" else 4, 50, 1e-5)
    if method == "eagle2":
        return DraftHead(config).eval()
    head = ViSpecHead(config, num_q=3)
    torch.nn.init.normal_(head.img_fc.weight, std=0.2)
    return head.eval()


@torch.no_grad()
def test_drafts_from_every_pair_are_those_of_decoding():
    for method, images in (("eagle2", []), ("vispec", []), ("vispec", [(2, 8)]), ("vispec", [(0, 4), (4, 9)])):
        head = make_head(method)
        ids = torch.randint(0, 50, (2, LENGTH))
        embeds = head.embed(ids)
        for start, end in images:
            embeds[:, start:end] = torch.randn(2, end - start, SIZE)
        hidden = torch.randn(2, LENGTH, SIZE)
        outs = list(drafted_in_a_row(head, hidden, embeds, [images, images], [LENGTH, LENGTH - 3], DEPTH))
        plain = head(hidden, embeds, shift_left(embeds, [LENGTH, LENGTH - 3]), [images, images], [LENGTH, LENGTH - 3])
        torch.testing.assert_close(outs[0][0], plain[0], rtol=1e-4, atol=1e-5)
        for prompt in (10, 13):  # tokens that the target has read when the draft begins
            for row in range(2):
                one = slice(row, row + 1)
                decoded = drafts_of_decoding(head, hidden[one], embeds[one], ids[one], images, prompt)
                for level, estimate in enumerate(decoded):
                    followed = outs[level][row, prompt + level - 1]
                    torch.testing.assert_close(followed, estimate, rtol=1e-4, atol=1e-5)


def drafts_of_decoding(head: DraftHead, hidden, embeds, ids, images: list, prompt: int) -> list[torch.Tensor]:
    """The head's estimates (H,) at the levels of a tree with one node a level, behind so many tokens of (1, L)."""
    memory = head.memory(1, LENGTH + DEPTH, SimpleNamespace(device=ids.device, dtype=hidden.dtype))
    memory.used = head.read(memory, as_prompt(hidden[:, :prompt], embeds[:, :prompt], images))
    root = ids[:, prompt]
    head.extend(memory, Kept(hidden[:, prompt - 1 : prompt], root[:, None], torch.ones_like(root)))
    estimates = []

    def logits(estimate: torch.Tensor) -> torch.Tensor:
        estimates.append(estimate[0, 0])
        following = ids[:, prompt + len(estimates), None]
        return F.one_hot(following, 50).float()

    head.candidates(memory, TreeShape(DEPTH, DEPTH - 1, 1), DraftOutput(logits, lambda rows: None))
    assert len(estimates) == DEPTH
    return estimates


class LargestTensor(TorchDispatchMode):
    """Sees how many numbers the largest tensor has that is computed meanwhile."""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        if isinstance(found, torch.Tensor):
            self.numel = max(self.numel, found.numel())
        return found


@torch.no_grad()
def test_long_samples_are_followed_some_rows_at_a_time(monkeypatch):
    head, images = make_head("vispec"), [(2, 8)]
    ids = torch.randint(0, 50, (2, 300))
    given = head, torch.randn(2, 300, SIZE), head.embed(ids), [images, images], [300, 280], DEPTH
    whole = list(drafted_in_a_row(*given))
    monkeypatch.setattr(chain, "SCORES", 2**14)
    with LargestTensor() as largest:
        parts = list(drafted_in_a_row(*given))
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)
    assert largest.numel < 120_000 < 2 * 4 * 296**2  # the rotary angles of all heads, and less than all scores


def test_counting_in_a_row():
    scored = torch.tensor([[False, True, True, True, False, True]])
    right = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()[:, None]
    along = torch.tensor([[True, True, True, True, True, True]])
    hits, counts = count_in_a_row(right, along, scored)
    # one token: pairs 1, 2, 3, 5; two: the drafts that end at 2 and 3; three: the one that ends at 3
    assert counts.tolist() == [4, 2, 1]
    assert hits.tolist() == [3, 1, 0]
    along[0, 1] = False  # the draft from pair 1 would go on with another token than the data
    hits, counts = count_in_a_row(right, along, scored)
    assert counts.tolist() == [4, 1, 0]
    assert hits.tolist() == [3, 1, 0]


def test_behind_an_image_of_no_vectors_the_chain_reads_the_target_s_feature():
    """With num_q 1 no output comes before the pair of an image's last row, from which drafting may begin."""
    torch.manual_seed(0)
    head, images = ViSpecHead(make_head("vispec").config, num_q=1), [[(2, 6), (6, 9)], [(0, 4)]]
    hidden, embeds = torch.randn(2, 2, 14, SIZE)
    first, second = draft_chain(head, hidden, embeds, images, [14, 12], steps=1)
    features = torch.cat([hidden[:, :1], first[:, :-1]], dim=1)
    for row, end in ((0, 6), (0, 9), (1, 4)):
        features[row, end - 1] = hidden[row, end - 1]
    next_embeds = shift_left(embeds, [14, 12])
    torch.testing.assert_close(second, head(features, embeds, next_embeds, images, [14, 12]))
    features[0, 8] += 1
    other = head(features, embeds, next_embeds, images, [14, 12])
    assert not torch.allclose(other[0, 8:], second[0, 8:]), "the feature matters"
