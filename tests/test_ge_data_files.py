"""Sample files: what they hold is what training reads, and no more."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from vispec.ge_data.sample_file import (
    Sample,
    Tokens,
    make_sample,
    needed_positions,
    read_length,
    read_note,
    read_sample,
    read_tokens,
    write_sample,
)
from vispec.ge_data.workers import gpu_groups
from vispec.model.drafts import ViSpecHead
from vispec.model.drafts.config import DraftConfig
from vispec.train.chain import draft_chain

SIZE = 16
IMAGES = {"none": [], "one": [(4, 12)], "first": [(0, 5)], "touching": [(3, 8), (8, 12), (15, 18)], "short": [(6, 7)]}


def full_hidden(sample):
    """(L, H) the features of a sample, zeros where none is stored."""
    full = sample.hidden.new_zeros(len(sample), SIZE)
    full[sample.hidden_positions] = sample.hidden
    return full


def full_sample(images, length=30, seed=0):
    """ids, mask with two answers, embeddings and features of a random sequence."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(length, dtype=torch.bool)
    mask[19:22] = mask[25:28] = True
    embeds, hidden = torch.randn(2, length, SIZE, generator=generator)
    return torch.randint(0, 40, (length,), generator=generator), mask, images, embeds, hidden


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
def test_nothing_that_training_reads_is_left_out(images):
    ids, mask, images, embeds, hidden = full_sample(images)
    positions = needed_positions(mask, images)
    head = ViSpecHead(DraftConfig(SIZE, 24, 2, 2, 40, 1e-5), num_q=3)
    torch.nn.init.normal_(head.img_fc.weight, std=0.3)
    spoiled = torch.full_like(hidden, 7.0)
    spoiled[positions] = hidden[positions]
    sample = make_sample(ids, mask, images, embeds, hidden)
    scored = sample.scored().nonzero()[:, 0]
    assert scored.tolist() == [17, 18, 19, 23, 24, 25]
    assert set((scored + 1).tolist()) <= set(positions.tolist())
    for expected, found in zip(
        draft_chain(head, hidden[None], embeds[None], [images], [30], 1),
        draft_chain(head, spoiled[None], embeds[None], [images], [30], 1),
        strict=True,
    ):
        torch.testing.assert_close(found[0, scored], expected[0, scored])
    # and each of the stored features matters, as input or as target
    for place in set(positions.tolist()) - set((scored + 1).tolist()):
        changed = hidden.clone()
        changed[place] += 1.0
        out = draft_chain(head, changed[None], embeds[None], [images], [30], 0)[0]
        assert not torch.allclose(out[0, scored], expected_first(head, hidden, embeds, images)[0, scored])


def expected_first(head, hidden, embeds, images):
    return draft_chain(head, hidden[None], embeds[None], [images], [30], 0)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    ids, mask, images, embeds, hidden = full_sample(IMAGES["touching"])
    sample = make_sample(ids, mask, images, embeds.to(dtype), hidden.to(dtype))
    path = tmp_path / "00000003.safetensors"
    size = write_sample(path, sample, {"index": 3})
    assert path.stat().st_size == size
    first = path.read_bytes()
    write_sample(path, sample, {"index": 3})
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    found = read_sample(path)
    for name in ("input_ids", "loss_mask", "image_embeds", "hidden_positions", "hidden"):
        assert torch.equal(getattr(found, name), getattr(sample, name)), name
    assert found.images == images
    assert found.hidden.dtype == dtype
    assert read_length(path) == 30
    assert read_note(path)["index"] == 3
    full = full_hidden(found)
    kept = needed_positions(mask, images)
    assert torch.equal(full[kept], hidden.to(dtype)[kept])
    assert full.count_nonzero() == len(kept) * SIZE


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "00000001.safetensors"
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="00000001"):
        read_sample(path)
    with pytest.raises(ValueError, match="00000001"):
        read_length(path)


def test_cut_never_splits_an_image():
    ids, mask, images, embeds, hidden = full_sample(IMAGES["touching"])
    sample = make_sample(ids, mask, images, embeds, hidden)
    assert len(sample.cut(99)) == 30
    for max_len, length, spans in ((20, 20, 3), (16, 15, 2), (10, 8, 1), (5, 3, 0)):
        cut = sample.cut(max_len)
        assert (len(cut), len(cut.images)) == (length, spans)
        tokens = Tokens(ids, mask, images, picture="a.png").cut(max_len)
        assert torch.equal(tokens.input_ids, cut.input_ids) and torch.equal(tokens.loss_mask, cut.loss_mask)
        assert tokens.images == cut.images and tokens.picture == "a.png"
        assert cut.image_embeds.shape[0] == sum(end - start for start, end in cut.images)
        assert (cut.hidden_positions < length).all()
        assert len(cut.hidden) == len(cut.hidden_positions)


def test_bytes_at_published_size(tmp_path):
    """LLaVA-1.6 7B, 2,900 image and 600 text tokens: at most 0.51 of two full matrices in half precision."""
    length, image, width = 3500, (40, 2940), 4096
    mask = torch.zeros(length, dtype=torch.bool)
    mask[3000:] = True
    ids, rows = torch.zeros(length, dtype=torch.long), torch.zeros(length, width, dtype=torch.bfloat16)
    write_sample(tmp_path / "00000000.safetensors", make_sample(ids, mask, [image], rows, rows))
    assert (tmp_path / "00000000.safetensors").stat().st_size <= 0.51 * (2 * length * width * 2)


def test_all_features_on_demand():
    ids, mask, images, embeds, hidden = full_sample(IMAGES["one"])
    assert not make_sample(ids, mask, images, embeds, hidden).has_all_features()
    sample = make_sample(ids, mask, images, embeds, hidden, store="all")
    assert sample.has_all_features()
    assert torch.equal(full_hidden(sample), hidden)
    assert isinstance(sample, Sample)


def test_gpu_groups():
    assert gpu_groups([], 1) == []
    assert gpu_groups(list("0123"), 2) == ["0,1", "2,3"]
    assert gpu_groups(list("01"), 0.5) == ["0", "0", "1", "1"]
    for gpus, size in ((list("0"), 2), (list("01"), 1.5), (list("01"), 0)):
        with pytest.raises(ValueError, match="gpus_per_model"):
            gpu_groups(gpus, size)


def changed_file(path, **changes):
    """A sample of 30 tokens with an image at [4, 12), some of whose tensors are others, or gone."""
    ids, mask, images, embeds, hidden = full_sample(IMAGES["one"])
    write_sample(path, make_sample(ids, mask, images, embeds, hidden))
    tensors = load_file(path)
    for name, change in changes.items():
        tensors[name] = change(tensors[name])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, path)


def spans(*values):
    return lambda _: torch.tensor(values)


def at(place, value):
    return lambda tensor: tensor.long().index_fill(0, torch.tensor([place]), value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": lambda _: torch.tensor(3)}, r"images is int64 \(\), expected int32 or int64 in 2 dimension"),
        ({"images": spans([4, 12, 1])}, r"images at \[\[4, 12, 1\]\]"),
        ({"images": spans([4, 2**31])}, r"images at \[\[4, 2147483648\]\] of 30 tokens"),
        ({"images": spans([12, 4])}, "images at .* expected ascending"),
        ({"images": spans([4, 12], [8, 14])}, "images at .* expected ascending"),
        ({"images": spans([-2, 6])}, "images at .* expected ascending"),
        ({"input_ids": lambda _: torch.zeros(0, dtype=torch.int64)}, "0 input_ids and a loss_mask of 30"),
        ({"input_ids": lambda ids: ids.float()}, r"input_ids is float32 \(30,\)"),
        ({"input_ids": lambda ids: ids[0]}, r"input_ids is int32 \(\)"),
        ({"input_ids": at(3, 10**6)}, "token 1000000, but the target has 40 tokens"),
        ({"input_ids": at(3, -1)}, "token -1"),
        ({"loss_mask": lambda mask: mask.int()}, "loss_mask is int32"),
        ({"loss_mask": lambda mask: mask[1:]}, "30 input_ids and a loss_mask of 29"),
        ({"hidden": lambda hidden: hidden.to(torch.uint8)}, "hidden is uint8"),
        ({"hidden": lambda hidden: hidden[0]}, r"hidden is float32 \(16,\)"),
        ({"hidden": lambda hidden: hidden[1:]}, "hidden_positions are not the ascending places of 18 features"),
        ({"hidden": lambda hidden: hidden[:, 1:]}, "features of 15 numbers, the draft head has 16"),
        ({"hidden": lambda _: None}, "token ids without features"),
        ({"hidden_positions": lambda _: None}, r"not a training sample \(no hidden_positions\)"),
        ({"hidden_positions": at(0, 29)}, "hidden_positions are not the ascending"),
        ({"hidden_positions": lambda places: places + 20}, "hidden_positions are not the ascending"),
        ({"loss_mask": lambda mask: ~mask}, "features that training reads are missing"),
        ({"image_embeds": lambda rows: rows[:, 1:]}, "image rows of 15 numbers, features of 16"),
        ({"image_embeds": lambda rows: rows[1:]}, "7 image rows, but images at"),
    ],
)
def test_what_does_not_fit_together_is_named(tmp_path, changes, message):
    path = tmp_path / "00000001.safetensors"
    changed_file(path)
    assert len(read_sample(path, 40, SIZE)) == len(read_tokens(path, 40)) == 30
    changed_file(path, **changes)
    with pytest.raises(ValueError, match=f"00000001.safetensors: {message}"):
        read_sample(path, 40, SIZE)
    if changes.keys() & {"input_ids", "loss_mask", "images"} and "features" not in message:
        with pytest.raises(ValueError, match=f"00000001.safetensors: {message}"):
            read_tokens(path, 40)


@pytest.mark.parametrize("note", ["[1]", '{"image": 3}', "{", "[" * 100_000, "3"])
def test_a_note_that_is_none_is_named(tmp_path, note):
    path = tmp_path / "00000001.safetensors"
    changed_file(path)
    save_file(load_file(path), path, {"vispec": note})
    with pytest.raises(ValueError, match="00000001.safetensors: not a training sample"):
        read_sample(path)
    changed_file(path, input_ids=lambda ids: ids[0])
    with pytest.raises(ValueError, match="00000001.safetensors: not a training sample"):
        read_length(path)
