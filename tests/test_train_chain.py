"""Drafts followed from all pairs at once are the drafts of the decoder."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vispec.model.draft import DraftHead, ViSpecHead
from vispec.model.draft_config import DraftConfig
from vispec.train import chain
from vispec.train.chain import count_in_a_row, drafted_in_a_row, shift_left

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
                state = head.begin(hidden[one, :prompt], embeds[one, :prompt], ids[one, prompt], [images])
                out = state.hidden[:, None]
                torch.testing.assert_close(outs[0][one, prompt - 1], out[:, 0], rtol=1e-4, atol=1e-5)
                for level in range(1, DEPTH):
                    token = ids[one, prompt + level][:, None]
                    ancestors = torch.ones(1, 1, level, dtype=torch.bool)
                    out = head.expand(state, level, out, token, ancestors)
                    torch.testing.assert_close(outs[level][one, prompt + level - 1], out[:, 0], rtol=1e-4, atol=1e-5)


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
    assert largest.numel < 40_000 < 2 * 4 * 296**2  # the MLP's rows, and less than all scores


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
