"""Text decoders with windows, scaled logits, latent attention and positions of their own answer as generate()."""

import threading

import pytest
import torch
from tiny_families import LATENT_KINDS, SCALES, WINDOWS, family_model, let_it_say_marks, llava_over
from tiny_models import generate

from vispec import SpecModel
from vispec.evaluation.families.family import VOCABULARY
from vispec.evaluation.families.oracle import Oracle
from vispec.evaluation.families.prompts import batch_of, prompt_of
from vispec.evaluation.families.registry import FAMILIES
from vispec.model.drafts import PromptLookup
from vispec.model.parts import LARGEST_PASS
from vispec.model.target import Target
from vispec.model.windows import READS_LAYER_TYPES, Windows

NEW = 24
LAYOUTS = ("a...", "..", "a.....")
TREES = [(12, 3, 4), (6, 4, 1)]


def check(family, target, layouts: tuple[str, ...] = LAYOUTS) -> None:
    """Every arm and tree gives each prompt, alone and among the others, what the model's own generate() gives it."""
    prompts = [prompt_of(family, target, layout, seed) for seed, layout in enumerate(layouts)]
    expected = [generate(target, inputs, max_new_tokens=NEW)[0] for inputs in prompts]
    oracle = Oracle(expected, VOCABULARY)
    for tree, draft in [(None, PromptLookup()), (TREES[0], PromptLookup()), *((tree, oracle) for tree in TREES)]:
        model = SpecModel(target, draft, *(tree or TREES[0]))
        arm = model.specgenerate if tree else model.baseline_generate
        out, new, rounds = arm(**prompts[0], max_new_tokens=NEW, log=True)
        assert torch.equal(out, expected[0][None])
        out = arm(**batch_of(prompts), max_new_tokens=NEW)
        assert [row[-NEW:].tolist() for row in out] == [text[-NEW:].tolist() for text in expected]
    assert rounds < new / 2  # the oracle's tokens are accepted


@pytest.mark.parametrize("kind", [*WINDOWS, *SCALES, *LATENT_KINDS])
def test_greedy_answers_are_those_of_generate(kind):
    family = llava_over(kind)
    check(family, family_model(family))


@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_change_the_answers(kind):
    """The tests above would not notice a window that is longer than the text."""
    wide = {name: 512 for name in ("sliding_window", "attention_chunk_size") if name in WINDOWS[kind]}
    families = llava_over(kind), llava_over(kind, **wide)
    targets = [family_model(family) for family in families]
    inputs = prompt_of(families[0], targets[0], LAYOUTS[0], seed=1)
    assert not torch.equal(*(generate(target, inputs, max_new_tokens=NEW) for target in targets))


def test_a_window_that_no_layer_uses():
    unused = {"layer_types": ["full_attention"] * 4} if READS_LAYER_TYPES else {"sliding_window_pattern": 1}
    family = llava_over("cohere2", **unused)
    target = family_model(family)
    assert not Windows(target, Target(target).decoder)
    check(family, target)


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_text_that_outgrows_the_window(kind):
    """Here the caches of transformers 4 for windows put an empty key in place of one, so generate() goes without."""
    family = llava_over(kind)
    target = family_model(family)
    inputs = prompt_of(family, target, ".", seed=2)
    expected = generate(target, inputs, max_new_tokens=NEW, use_cache=False)
    model = SpecModel(target, Oracle(list(expected), VOCABULARY), *TREES[0])
    assert torch.equal(model.baseline_generate(**inputs, max_new_tokens=NEW), expected)
    assert torch.equal(model.specgenerate(**inputs, max_new_tokens=NEW), expected)


@pytest.mark.parametrize("name", ["paligemma", "paligemma (Gemma 2)", "gemma3"])
def test_positions_that_begin_with_one_and_images_that_see_themselves_to_both_sides(name):
    check(FAMILIES[name], family_model(name), (*LAYOUTS, "a.a..."))


@pytest.mark.parametrize("name", ["gemma4", "gemma3n", "hunyuan_vl", "exaone4_5", "kimi_k25"])
def test_families_with_positions_caches_and_tables_of_their_own(name):
    """Positions in four rows, or in one beside M-RoPE's offset; layers of two widths; tables of tokens in layers.

    Some of the answers hold what stands for an image.
    """
    for seed in range(2):
        target = family_model(name, seed)
        let_it_say_marks(target)
        check(FAMILIES[name], target, ("....", "..", "......"))


# --- logits behind the head ---


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "cohere2", *SCALES])
def test_logits_are_those_of_the_model(kind):
    """Which classes apply their config's numbers differs between versions of transformers."""
    family = llava_over(kind)
    model = family_model(family)
    target, inputs = Target(model), prompt_of(family, model, "a..", 0)
    expected = model(**inputs).logits
    read = target.prefill(target.new_cache(1, 64), inputs.pop("input_ids"), inputs)
    torch.testing.assert_close(target.logits(read.hidden), expected)
    torch.testing.assert_close(read.logits, expected[:, -1])


def test_logits_that_change_in_an_unknown_way_are_refused():
    model = family_model(llava_over("cohere"))
    forward = type(model).forward

    def cubed(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits**3
        return out

    model.__class__ = type("Odd", (type(model),), {"forward": cubed})
    with pytest.raises(ValueError, match="^Odd changes logits after its output head in a way that is not known here"):
        Target(model)


def test_places_of_late_queries_that_depend_on_slots():
    """Llama 4 scales them by their number in the pass, which for a tree is not their place: texts end before that."""
    target = Target(family_model(llava_over("llama4_text", max_position_embeddings=9000)))
    assert target.max_positions == 8192 - 1 - LARGEST_PASS


# --- windows and their users ---


def test_threads_share_a_target_with_windows():
    """The attention modules, which are given masks for the time of a pass, are those of all threads."""
    family = llava_over("mistral")
    target = family_model(family)
    prompts = [prompt_of(family, target, layout, seed) for seed, layout in enumerate(("a...", "a..", "a.....", "..a"))]
    expected = [generate(target, inputs, max_new_tokens=NEW) for inputs in prompts]
    model, found = SpecModel(target, PromptLookup(), 12, 3, 4), {}

    def answer(number: int) -> None:
        found[number] = [model.specgenerate(**prompts[number], max_new_tokens=NEW) for _ in range(3)]

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, text in enumerate(expected):
        assert len(found[number]) == 3 and all(torch.equal(out, text) for out in found[number])
    assert not any(module._forward_pre_hooks for module in target.modules())
