"""A VLM as the draft: lossless like the other methods, and whose own draft it is accepts everything."""

import json
import shutil

import pytest
import torch
from test_batches import check
from tiny_families import family_model
from tiny_models import FAMILIES, GOLDEN, generate, greedy_lengths, image_prompt, random_target, read_prompt

from vispec import SpecModel
from vispec.cli import UserError
from vispec.evaluation import gen_spec_answer_gqa, run_all
from vispec.evaluation.families.prompts import prompt_of
from vispec.evaluation.families.registry import FAMILIES as TABLE
from vispec.evaluation.loading import Models, load_models
from vispec.evaluation.measure import Generation
from vispec.evaluation.settings import asked_settings
from vispec.model.drafts import VLMDraft
from vispec.model.drafts.vlm import kept_places
from vispec.model.target import Target
from vispec.model.tree import choose_nodes

TREES = ("12/3/4", "7/0/6", "5/3/1", "40/2/9")
VOCABULARY = 60


def own_draft(model, tree: str = "5/3/1", **options) -> SpecModel:
    """A target that drafts for itself."""
    target = Target(model)
    return SpecModel(target, VLMDraft(target, **options), tree=tree)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_targets(family, tree):
    target, draft = (random_target(family, seed, VOCABULARY) for seed in (1, 2))
    lengths = greedy_lengths(SpecModel(target, VLMDraft(draft), tree=tree), [".a.b.", "...", "ab."], 24)
    assert 0 < sum(lengths) < len(lengths) * (int(tree.split("/")[1]) + 1)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_target_as_its_own_draft_is_always_right(family, fast):
    """Whatever is wrong with positions or with what is kept shows as a token that the target does not say."""
    target = Target(random_target(family, 3), fast)
    model = SpecModel(target, VLMDraft(target), tree="6/4/1")
    lengths = greedy_lengths(model, [".a.b.", "...", ".a"], 31)  # one of the prompt, then five rounds of six
    assert lengths == [5] * 15


@pytest.mark.parametrize("name", ["gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"])
@pytest.mark.parametrize("layout", [".a.b.", ".A.B"])
def test_so_it_is_in_other_families_and_with_videos(name, layout):
    """Sliding windows among them."""
    target, family = family_model(name, seed=2), TABLE[name]
    if "A" in layout and family.videos is None:
        pytest.skip("no videos")
    inputs = prompt_of(family, target, layout, 1)
    expected = generate(target, inputs, max_new_tokens=21)
    own, other = VLMDraft(target), VLMDraft(family_model(name, seed=5))
    answer, lengths = SpecModel(target, own, tree="5/3/1").specgenerate(
        **inputs, max_new_tokens=21, return_acceptance_len=True
    )
    assert torch.equal(answer, expected) and lengths == [4] * 4
    assert torch.equal(SpecModel(target, other, tree="12/3/3").specgenerate(**inputs, max_new_tokens=21), expected)
    assert_same_scores(SpecModel(target, own, tree="12/3/3"), inputs)


def assert_same_scores(model: SpecModel, inputs: dict) -> None:
    """All that a target says as its own draft of a tree's nodes, level by level, it says of them when it verifies."""
    target, draft, shape = model.target, model.draft, model.shape
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    with torch.inference_mode():
        cache = target.new_cache(1, 300)
        prompt = target.prefill(cache, inputs["input_ids"], rest)
        root = prompt.logits.argmax(-1)
        memory = read_prompt(draft, target, prompt, root)
        candidates = draft.candidates(memory, shape, draft.output(target))
        tree = choose_nodes(root, candidates, shape)
        positions = cache.lengths[:, None] + tree.depths + (0 if prompt.rope_delta is None else prompt.rope_delta)
        said = target.logits(target.forward(cache, tree.tokens, positions, tree.mask).hidden).log_softmax(-1)[0]
    parents = tree.parents[0, 1:]
    steps = torch.cat([torch.zeros(1), said[parents, tree.tokens[0, 1:]]])
    found = (tree.mask[0] * steps).sum(1)[1:]
    expected = candidates.scores[0].topk(shape.total_token - 1).values
    torch.testing.assert_close(found.sort(descending=True).values, expected, rtol=1e-4, atol=1e-4)


def test_a_draft_of_another_family_with_the_same_pixels():
    target, draft = random_target("qwen2_5_vl", 1, VOCABULARY), random_target("qwen2_vl", 2, VOCABULARY)
    assert sum(greedy_lengths(SpecModel(target, VLMDraft(draft), tree="30/3/8"), [".a.b.", "..", "ab."], 24))


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_rows_of_a_batch_leave_and_a_plain_step_lies_between(family):
    target = random_target(family, 4, VOCABULARY)
    prompts = [image_prompt(target, seed, layout) for seed, layout in enumerate((".a.", "...", "ab.", "."))]
    for draft in (random_target(family, 5, VOCABULARY), target):
        model = SpecModel(target, VLMDraft(draft), tree="12/3/4")
        check(model, prompts, "specgenerate", max_new_tokens=20)
        model.set_tree("auto")
        expected = generate(target, prompts[0], max_new_tokens=40)
        assert torch.equal(model.specgenerate(**prompts[0], max_new_tokens=40), expected)


@pytest.mark.parametrize("more", [40, -10])
def test_tables_of_unequal_length(more):
    """Tokens that only one of the two has are never drafted, and are read as another one."""
    target = random_target("llava_1.5", 1)
    rows = len(target.get_input_embeddings().weight)
    draft = random_target("llava_1.5", 1, rows + more)
    draft.config.image_token_index = draft.config.image_token_id = target.config.image_token_index
    draft = VLMDraft(draft)
    model = SpecModel(target, draft, tree="400/1/300")
    assert model.shape.top_k == draft.proposed == min(rows, rows + more)
    greedy_lengths(model, [".", ".a." if more > 0 else ".."], 16)


def test_sampled_answers_have_the_targets_distribution():
    """A seed gives one text with and without a draft, which the target's own distribution draws."""
    target = random_target("llava_1.5", 6, VOCABULARY)
    model = SpecModel(target, VLMDraft(random_target("llava_1.5", 7, VOCABULARY)), tree="12/3/4")
    inputs = image_prompt(target, 0, ".a.")
    drawn = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 16}
    for seed in range(4):
        plain, drafted = (model.generate(**inputs, **drawn, seed=seed, speculate=speculate) for speculate in (0, 1))
        assert torch.equal(plain, drafted)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_fewer_image_rows(family):
    """Answers stay; what is kept is what a mask over the same cache leaves visible."""
    target = random_target(family, 8, VOCABULARY)
    thin = own_draft(target, image_rows=0.2)
    greedy_lengths(thin, [".a.b.", "...", "ab."], 24)
    inputs = image_prompt(target, 1, ".a.b.")
    ids = inputs.pop("input_ids")
    reader, draft = thin.target, thin.draft
    with torch.inference_mode():
        prompt = reader.prefill(reader.new_cache(1, 300), ids, inputs)
        left = kept_places(prompt.images[0], ids.shape[1], 0.2)
        memory = draft.memory(1, 300, reader)
        assert draft.read(memory, prompt) == len(left) < ids.shape[1]
        whole = reader.new_cache(1, 300)
        reader.prefill(whole, ids, inputs)
        for (_, kept), (_, full) in zip(memory.cache._buffers.items(), whole._buffers.items(), strict=True):
            assert torch.equal(kept[..., : len(left), :], full[..., left, :])


def test_evenly_spaced_rows():
    assert kept_places([(1, 11), (12, 15)], 16, 0.2) == [0, 3, 8, 11, 13, 15]
    assert kept_places([(0, 4)], 6, 0.5) == [0, 1, 3, 4, 5], "the first token stays, whatever it is"
    assert kept_places([(2, 5)], 6, 0.01) == [0, 1, 3, 5], "one row at least"


@pytest.mark.parametrize("share", [0, 1.5, -1])
def test_no_such_share(share):
    with pytest.raises(ValueError, match="draft_image_rows must be above 0 and at most 1"):
        VLMDraft(random_target("llava_1.5", 1), share)


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("llava_next", {}, "image token .*family llava_next, the target has llava"),
        ("llava_1.5", {"vocabulary": 5000}, "another tokenizer: 5000 tokens"),
        ("llava_1.5", {"patch_size": 14}, "patch_size 14, the target has 7"),
    ],
)
def test_drafts_that_do_not_fit(family, change, said):
    target = random_target("llava_1.5", 1)
    draft = random_target(family, 1, change.get("vocabulary", VOCABULARY if family == "llava_next" else None))
    draft.config.vision_config.patch_size = change.get("patch_size", 7)
    with pytest.raises(ValueError, match=said):
        SpecModel(target, VLMDraft(draft))


def test_a_draft_that_keeps_a_state():
    with pytest.raises(ValueError, match="keep one state of the whole text"):
        VLMDraft(family_model("qwen3_5"))


# --- folders ---

FOLDER = GOLDEN / "llava_next" / "target"


def test_a_folder_of_a_vlm_is_told_from_a_head():
    for method in (None, "vlm"):
        model = SpecModel.from_pretrained(FOLDER, FOLDER, method=method, draft_image_rows=0.5, tree="5/3/1")
        assert model.draft.method == "vlm" and model.draft.image_rows == 0.5
    head = GOLDEN / "llava_next" / "draft_vispec"
    with pytest.raises(ValueError, match="config.json is none of a VLM, and method 'vlm' takes a whole one"):
        SpecModel.from_pretrained(FOLDER, head, method="vlm")
    with pytest.raises(ValueError, match="draft_image_rows is of a smaller VLM as the draft"):
        SpecModel.from_pretrained(FOLDER, head, draft_image_rows=0.5)
    with pytest.raises(ValueError, match="draft_image_rows is of method 'vlm'"):
        SpecModel.from_pretrained(FOLDER, method="lookup", draft_image_rows=0.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"a": 5, "b": 4}, "token 4 is 'b', there 'a'"), ({"a": None, "A": 4}, "token 4 is 'A', there 'a'")],
)
def test_another_tokenizer(tmp_path, changes, said):
    shutil.copytree(FOLDER, tmp_path / "draft")
    file = tmp_path / "draft" / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"] | changes
    values["model"]["vocab"] = {token: i for token, i in vocabulary.items() if i is not None}
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"its tokenizer is another one than that of .*{said}"):
        SpecModel.from_pretrained(FOLDER, tmp_path / "draft")


def test_commands_load_it_and_note_its_image_rows():
    models = Models(str(FOLDER), {"vlm-thin": str(FOLDER)}, draft_image_rows=0.5)
    assert load_models(models)["vlm-thin"].draft.image_rows == 0.5
    settings = asked_settings(models, "vlm-thin", "gqa", "", {}, Generation(0.0, 8), 1)
    assert settings["draft_image_rows"] == 0.5 and settings["spec_model"] == str(FOLDER)


def test_image_rows_are_of_a_vlm():
    asked = ["--base-model-path", "t", "--draft-image-rows", "0.2"]
    with pytest.raises(UserError, match="--draft-image-rows is of vlm, which is not among the methods"):
        run_all.main([*asked, "--out", "o", "--methods", "lookup"])
    with pytest.raises(UserError, match="--draft-image-rows is of --method vlm, found lookup"):
        gen_spec_answer_gqa.main([*asked, "--method", "lookup"])
