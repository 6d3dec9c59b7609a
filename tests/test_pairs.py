"""What a draft head reads of a prompt with images, against a reference that walks over the tokens one by one."""

import pytest
import torch
import torch.nn.functional as F
from test_tree import run_layer
from tiny_models import ON_CPU, bare_head, image_prompt, random_head, random_target, read_prompt, read_rows

from vispec.model.drafts import DraftHead, ViSpecHead
from vispec.model.drafts.config import DraftConfig
from vispec.model.drafts.pair_head import DraftMemory
from vispec.model.families import image_token_id
from vispec.model.pairs import Span, plan_pairs
from vispec.model.target import Target

SIZE = 32
CONFIG = DraftConfig(
    hidden_size=SIZE,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=20,
    rms_norm_eps=1e-5,
)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}

ROWS: dict[str, tuple[int, list[Span]]] = {
    "no image": (9, []),
    "one image": (12, [(3, 8)]),
    "several": (24, [(2, 9), (12, 13), (15, 21)]),
    "touching": (20, [(4, 9), (9, 16)]),
    "three touching": (18, [(1, 5), (5, 6), (6, 14)]),
    "at the very start": (11, [(0, 6)]),
    "one token at the very start": (5, [(0, 1)]),
    "two at the very start": (14, [(0, 5), (5, 10)]),
    "at the very end": (10, [(5, 10)]),
    "nothing else": (7, [(0, 7)]),
    "short runs": (13, [(2, 4), (6, 7), (9, 12)]),
    "a single token": (1, []),
}


def reference(
    head: DraftHead, hidden: torch.Tensor, embeds: torch.Tensor, next_embeds: torch.Tensor, images: list[Span]
) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """One row, (L, H) each: the positions of the pairs that are run, their outputs, and the last global feature."""
    length = len(hidden)
    compressed: dict[int, list[torch.Tensor]] = {}  # the vectors that take the place of an image, by its first pair
    covered: set[int] = set()
    global_after: dict[int, torch.Tensor] = {}  # by the first token behind an image
    if isinstance(head, ViSpecHead):
        for start, end in images:
            vectors = head.imadpt(embeds[start:end])
            pairs = [i for i in range(length) if start <= i + 1 < end]
            covered.update(pairs)
            global_after[end] = vectors[-1]
            if pairs:
                compressed[pairs[0]] = [(pairs, v) for v in vectors[:-1]]

    positions, inputs = [], []
    g = torch.zeros(SIZE)
    for i in range(length):
        g = global_after.get(i + 1, g)  # also where the image ends the prompt
        for number, (pairs, vector) in enumerate(compressed.get(i, [])):
            from_the_end = len(compressed[i]) - number
            positions.append(max(pairs[-1] + 1 - from_the_end, pairs[0]))
            inputs.append(vector)
        if i not in covered:
            feature = hidden[i]
            if isinstance(head, ViSpecHead):
                feature = head.img_fc(torch.cat([feature, g]))
            positions.append(i)
            inputs.append(head.fc(torch.cat([next_embeds[i], feature])))
    return positions, run_layer(head, torch.stack(inputs), positions), g


def random_rows(names: list[str], seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [ROWS[name][0] for name in names]
    hidden = [torch.randn(n, SIZE, generator=generator) for n in lengths]
    embeds = [torch.randn(n, SIZE, generator=generator) for n in lengths]
    following = [torch.randn(1, SIZE, generator=generator) for _ in lengths]
    return hidden, embeds, [torch.cat([e[1:], f]) for e, f in zip(embeds, following, strict=True)]


def read(head: DraftHead, hidden, embeds, root, images: list[list[Span]]) -> DraftMemory:
    """What a head remembers of prompts of one length, with the token after each."""
    memory = head.memory(len(root), hidden.shape[1] + 20, ON_CPU)
    read_rows(head, memory, hidden, embeds, root, images)
    return memory


HEADS = [("vispec", 1), ("vispec", 2), ("vispec", 5), ("eagle2", 2)]


@pytest.mark.parametrize(("method", "num_q"), HEADS)
@pytest.mark.parametrize("name", ROWS)
@torch.inference_mode()
def test_reading_runs_the_right_pairs(name, method, num_q):
    head = bare_head(CONFIG, method, seed=1, num_q=num_q)
    length, images = ROWS[name]
    (hidden,), (embeds,), _ = random_rows([name], seed=2)
    root = torch.tensor([7])
    next_embeds = torch.cat([embeds[1:], head.embed_tokens(root)])
    positions, outputs, g = reference(head, hidden, embeds, next_embeds, images)

    memory = read(head, hidden[None], embeds[None], root, [images])
    torch.testing.assert_close(memory.estimate, outputs[-1:], **TOLERANCE)
    assert memory.position.tolist() == [length]
    assert memory.cache.lengths.tolist() == [len(positions)]
    if method == "vispec":
        torch.testing.assert_close(memory.global_feature, g[None], **TOLERANCE)
        assert head.plan([length], [images]).positions[0].tolist() == positions


@pytest.mark.parametrize(("method", "num_q"), HEADS)
@torch.inference_mode()
def test_forward_over_a_batch_equals_each_row(method, num_q):
    """Rows of different lengths, right-padded with numbers that nobody may read."""
    head = bare_head(CONFIG, method, seed=3, num_q=num_q)
    names = list(ROWS)
    rows = random_rows(names, seed=4)
    lengths = [ROWS[name][0] for name in names]
    images = [ROWS[name][1] for name in names]
    longest = max(lengths)
    hidden, embeds, next_embeds = (
        torch.stack([F.pad(row, (0, 0, 0, longest - len(row)), value=1e4) for row in tensors]) for tensors in rows
    )
    out = head(hidden, embeds, next_embeds, images, lengths)

    assert out.shape == hidden.shape
    for row, tensors in enumerate(zip(*rows, strict=True)):
        positions, outputs, _ = reference(head, *tensors, images[row])
        expected = torch.zeros(longest, SIZE)
        expected[positions] = outputs
        # vectors that share a position (an image shorter than they are many) have no place of their own in the output
        single = [p for p in range(longest) if positions.count(p) < 2]
        torch.testing.assert_close(out[row, single], expected[single], **TOLERANCE)


@pytest.mark.parametrize(("method", "num_q"), HEADS)
@torch.inference_mode()
def test_reading_equals_forward(method, num_q):
    head = bare_head(CONFIG, method, seed=5, num_q=num_q)
    for name, (_, images) in ROWS.items():
        (hidden,), (embeds,), _ = random_rows([name], seed=6)
        root = torch.tensor([11])
        next_embeds = torch.cat([embeds[1:], head.embed_tokens(root)])
        whole = head(hidden[None], embeds[None], next_embeds[None], [images])
        memory = read(head, hidden[None], embeds[None], root, [images])
        torch.testing.assert_close(memory.estimate, whole[:, -1], msg=name, **TOLERANCE)


@torch.inference_mode()
def test_reading_rows_that_shrink_differently():
    head = bare_head(CONFIG, "vispec", seed=7, num_q=3)
    images = [[(2, 9)], [], [(0, 3), (3, 8)]]
    generator = torch.Generator().manual_seed(8)
    hidden, embeds = (torch.randn(3, 12, SIZE, generator=generator) for _ in range(2))
    root = torch.tensor([1, 2, 3])
    together = read(head, hidden, embeds, root, images)
    for row in range(3):
        alone = read(head, hidden[row : row + 1], embeds[row : row + 1], root[row : row + 1], [images[row]])
        torch.testing.assert_close(together.estimate[row : row + 1], alone.estimate, **TOLERANCE)
        torch.testing.assert_close(together.global_feature[row : row + 1], alone.global_feature, **TOLERANCE)
        assert together.cache.lengths[row] == alone.cache.lengths[0]
        assert together.position[row] == alone.position[0]


@pytest.mark.parametrize("num_q", [1, 2, 4])
@torch.inference_mode()
def test_eight_images_cost_no_more_than_their_compressed_tokens(num_q):
    """The length of the draft head's cache after one prompt of Qwen's; EAGLE-2's holds every image token."""
    target = random_target("qwen2_5_vl", seed=11)
    inputs = image_prompt(target, 11, ".a.bb.c.a.b.cc.")
    ids = inputs.pop("input_ids")
    tokens, text = ids.shape[1], int((ids != image_token_id(target.config)).sum())
    wrapped = Target(target)
    prompt = wrapped.prefill(wrapped.new_cache(1, tokens), ids, inputs)
    root = prompt.logits.argmax(-1)
    heads = {method: random_head(target, method, seed=12, num_q=num_q) for method in ("vispec", "eagle2")}
    memories = {method: read_prompt(head, wrapped, prompt, root) for method, head in heads.items()}
    assert len(prompt.images[0]) == 8 and text < tokens - 8
    assert memories["vispec"].cache.lengths.tolist() == [text + 8 * (num_q - 1)]
    assert memories["eagle2"].cache.lengths.tolist() == [tokens]
    assert all(memory.used == int(memory.cache.lengths) for memory in memories.values())


def test_gradients_reach_every_trained_parameter():
    head = bare_head(CONFIG, "vispec", seed=9, num_q=3)
    hidden, embeds, next_embeds = (torch.stack(tensors) for tensors in random_rows(["several"] * 2, seed=10))
    head(hidden, embeds, next_embeds, [ROWS["several"][1]] * 2).pow(2).sum().backward()
    for name, parameter in head.named_parameters():
        if name == "embed_tokens.weight":
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_an_image_covers_the_pairs_before_its_tokens():
    layout = plan_pairs([10], [[(3, 7)]], compressed=1)
    assert layout.positions.tolist() == [[0, 1, 5, 6, 7, 8, 9]]
    assert layout.compressed.tolist() == [[-1, -1, 0, -1, -1, -1, -1]]
    # the pair of the last image row is text already and knows the image
    assert layout.image_before.tolist() == [[-1, -1, -1, 0, 0, 0, 0]]


def test_reset_makes_the_head_ignore_the_image():
    head = bare_head(CONFIG, "vispec", seed=11)
    head.reset_image_parameters()
    hidden, g = torch.randn(1, 4, SIZE), torch.randn(1, SIZE)
    torch.testing.assert_close(head.img_fc(torch.cat([hidden, g[:, None].expand_as(hidden)], -1)), hidden)
    assert 0.5 < head.imadpt.q.std() * CONFIG.head_dim**0.5 < 1.5


@torch.no_grad()
def test_a_blind_head_never_sees_the_image():
    head = ViSpecHead(CONFIG, num_q=2).eval()
    torch.nn.init.normal_(head.img_fc.weight, std=0.2)
    generator = torch.Generator().manual_seed(0)
    hidden, embeds = torch.randn(2, 1, 12, SIZE, generator=generator).unbind(0)
    other = embeds.clone()
    other[:, 3:8] = torch.randn(1, 5, SIZE, generator=generator)

    def outputs(pictures: torch.Tensor) -> torch.Tensor:
        # text pairs that follow the image; their own inputs are the same with both pictures
        return head(hidden, pictures, F.pad(pictures[:, 1:], (0, 0, 0, 1)), [[(3, 8)]])[:, 8:]

    assert not torch.allclose(outputs(embeds), outputs(other), **TOLERANCE)
    head.blind()
    torch.testing.assert_close(outputs(embeds), outputs(other), rtol=0, atol=0)
    assert not head.imadpt.o_proj.weight.requires_grad
