"""Which keyword arguments the arms take: processor outputs of the target's family, and none that is misspelt."""

import pytest
import torch
from tiny_models import FAMILIES, image_prompt, random_pair, random_target, recorded_model

from vispec import SpecModel
from vispec.model.inputs import forward_parameters

PROMPT = torch.tensor([[5, 6, 7, 8]])
ARMS = ("specgenerate", "baseline_generate", "stream")


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_tokens", "; did you mean max_new_tokens?"),
        ("do_sampel", r"; did you mean temperature \(0 is greedy\)?"),
        ("do_sample", r"; did you mean temperature \(0 is greedy\)?"),
        ("pixel_value", "; did you mean pixel_values?"),
        ("position_ids", ""),
        ("use_cache", ""),
        ("quality", ""),
    ],
)
def test_unknown_arguments_are_refused_by_name(arm, name, hint, monkeypatch):
    model = recorded_model("llava_next", "vispec")
    monkeypatch.setattr(model.target, "prefill", lambda *_: pytest.fail("work before the check"))
    with pytest.raises(TypeError, match=rf"^{arm}\(\) got an unexpected keyword argument '{name}'{hint}") as caught:
        getattr(model, arm)(PROMPT, **{name: None})
    assert "\n" not in str(caught.value)


def test_options_of_another_arm_are_no_hint():
    with pytest.raises(TypeError, match=r"stream\(\) got an unexpected keyword argument 'log'$"):
        recorded_model("llava_next", "vispec").stream(PROMPT, log=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_processors_return_is_taken(family):
    """Also what a processor says about its ids that this family's forward does not take."""
    model = random_pair(family, 0)
    inputs = image_prompt(model.target.model, 0, "a.")
    assert inputs.keys() - {"input_ids"} <= set(forward_parameters(model.target.model))
    kinds = {"token_type_ids": torch.zeros_like(inputs["input_ids"]), "pixel_values_videos": None}
    expected = model.baseline_generate(**inputs, max_new_tokens=3)
    assert torch.equal(model.specgenerate(**inputs, **kinds, max_new_tokens=3), expected)


@pytest.mark.parametrize("ids", [[[5, 6]], PROMPT.float()])
def test_ids_that_are_no_ids(ids):
    with pytest.raises(TypeError, match="input_ids must be a tensor of ids, found (list|torch.float32); .*return_tens"):
        recorded_model("llava_next", "vispec").specgenerate(ids)


@pytest.mark.parametrize("arm", ["generate", "specgenerate", "stream"])
@pytest.mark.parametrize("shape", [(3,), (1, 1, 3), (1, 0), (0, 3)])
def test_ids_of_other_shapes(arm, shape):
    with pytest.raises(ValueError, match=r"input_ids must have the shape \(B, L\)"):
        getattr(recorded_model("llava_next", "vispec"), arm)(torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("wrong", [12, -1])
def test_ids_beyond_the_vocabulary(wrong):
    model = SpecModel(random_target("llava_1.5", 0, vocabulary=12))
    with pytest.raises(ValueError, match=f"input_ids has the id {wrong}, the target's vocabulary 12: is the processor"):
        model.baseline_generate(torch.tensor([[5, wrong, 6]]))


# --- values that no processor returns ---

CALLS = (*ARMS, "generate")
PIXELS = torch.zeros(1, 3, 28, 28)


def answered(model: SpecModel, arm: str, *args, **options):
    found = getattr(model, arm)(*args, **options)
    return list(found) if arm == "stream" else found


@pytest.mark.parametrize("arm", CALLS)
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("attention_mask", [[1, 1, 1, 1]], TypeError),
        ("attention_mask", torch.full((1, 4), -100), ValueError),
        ("attention_mask", torch.ones(1, 3), ValueError),
        ("pixel_values", PIXELS.numpy(), TypeError),
        ("pixel_values", PIXELS[:0], ValueError),
        ("pixel_values", PIXELS / 0, ValueError),
        ("pixel_values", PIXELS + torch.inf, ValueError),
        ("max_new_tokens", float("nan"), ValueError),
        ("max_new_tokens", float("inf"), ValueError),
        ("max_new_tokens", True, TypeError),
        ("max_new_tokens", "3", TypeError),
        ("max_length", float("inf"), ValueError),
        ("temperature", float("inf"), ValueError),
        ("temperature", "hot", TypeError),
        ("top_k", float("inf"), ValueError),
        ("top_p", float("nan"), ValueError),
    ],
)
def test_wrong_values_are_refused_by_name(arm, name, value, error):
    model = random_pair("llava_1.5", 0)
    with pytest.raises(error, match=name) as caught:
        answered(model, arm, PROMPT, **{"max_new_tokens": 3} | {name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arm", CALLS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_ids_of_other_dtypes(arm, dtype):
    with pytest.raises(TypeError, match="input_ids must be a tensor of ids"):
        answered(random_pair("llava_1.5", 0), arm, PROMPT.to(dtype))


@pytest.mark.parametrize("arm", CALLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_without_pixels(arm, family):
    """Grids or sizes may have been kept."""
    model = random_pair(family, 0)
    inputs = image_prompt(model.target.model, 0, "a.")
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="image tokens, but pixel_values is not among its inputs"):
        answered(model, arm, **inputs, max_new_tokens=3)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("llava_1.5", "vision_feature_layer", -99),
        ("llava_1.5", "vision_feature_layer", "x"),
        ("llava_next", "image_grid_pinpoints", []),
        ("llava_next", "image_grid_pinpoints", "x"),
        ("qwen2_5_vl", "image_token_id", None),
    ],
)
def test_odd_values_of_a_config_are_one_line(family, name, value):
    """They are of the right kind for the config, and code of transformers trips over them at the first picture."""
    target = random_target(family, 0)
    inputs = image_prompt(target, 0, "a.")
    object.__setattr__(target.config, name, value)  # configs of transformers 5 look at what is set
    with pytest.raises(ValueError, match="cannot read the prompt; does its config fit|image token") as error:
        SpecModel(target).baseline_generate(**inputs, max_new_tokens=2)
    assert "\n" not in str(error.value)


def test_no_target_or_draft():
    target = random_target("llava_1.5", 0)
    with pytest.raises(TypeError, match="target must be a loaded model, found Linear"):
        SpecModel(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="tree must be str or TreeShape, found 5"):
        SpecModel(target, tree=5)
    with pytest.raises(TypeError, match="target must be a loaded model, found str; SpecModel.from_pretrained loads"):
        SpecModel("x")
    with pytest.raises(TypeError, match="draft must be a draft head or a PromptLookup, found str"):
        SpecModel(target, "x")
    with pytest.raises(TypeError, match="torch_dtype must be 'auto' or a dtype of torch, found 3"):
        SpecModel.from_pretrained("x", torch_dtype=3)
    for name in ("total_token", "depth", "top_k"):
        with pytest.raises(ValueError, match=f"{name} must be a finite number, found inf"):
            SpecModel(target, **{name: float("inf")})


def test_a_target_that_answers_no_text_alone():
    """InstructBLIP."""
    target = random_target("llava_next", 0)
    forward = type(target).forward
    needing = {"forward": lambda self, pixel_values, input_ids=None, **others: forward(self, input_ids, **others)}
    target.__class__ = type("Odd", (type(target),), needing)
    with pytest.raises(ValueError, match="^Odd answers no prompt without pixel_values$"):
        SpecModel(target).baseline_generate(PROMPT, max_new_tokens=2)
