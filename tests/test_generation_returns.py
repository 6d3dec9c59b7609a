"""What `SpecModel.generate` returns and when it stops, as the target's own generate() does; what it refuses."""

import threading

import pytest
import torch
import transformers
from generations import END, NEW, both, model_of
from test_batches import batch_of, prompts_of
from tiny_models import image_prompt, reference_inputs, text_prompt
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, StoppingCriteria

from vispec import SpecModel
from vispec.model.generation import SpecOutput

SAMPLING = {
    "temperature": 0.8, "top_k": 4, "top_p": 0.8, "min_p": 0.1, "typical_p": 0.8, "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.05,
}  # fmt: skip


# --- stopping ---


class AfterThree(StoppingCriteria):
    """After a token that follows itself, or the third 8."""

    def __call__(self, input_ids, scores, **kwargs):
        twice = input_ids[:, -1] == input_ids[:, -2]
        return twice | ((input_ids[:, -8:] == 8).sum(1) >= 3)


class LowScore(StoppingCriteria):
    """When the newest token was chosen with less than a bound."""

    def __call__(self, input_ids, scores, **kwargs):
        return scores[-1].gather(1, input_ids[:, -1:])[:, 0] < 2.0


@pytest.mark.parametrize("eos", [END, None])
@pytest.mark.parametrize("rows", [1, 4])
def test_stopping_criteria(rows, eos):
    """Without an end token the rows of a batch go on until all have met one, as in generate()."""
    ended = set()
    for seed in range(4):
        model = model_of("llava_1.5", seed)
        inputs = batch_of(prompts_of(model.target.model)[:rows])
        ended.add(len(both(model, inputs, stopping_criteria=[AfterThree()], eos_token_id=eos)[0]))
    assert len(ended) > 1, "all answers reach the limit, so nothing was tested"


def test_criteria_that_look_at_scores():
    model = model_of("llava_1.5")
    inputs = text_prompt(model.target.model, 5, seed=1)
    options = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": NEW}
    ours, theirs = (
        generate(**inputs, **options, stopping_criteria=[LowScore()]).sequences
        for generate in (model.generate, model.target.model.generate)
    )
    assert torch.equal(ours, theirs) and ours.shape[1] < 5 + NEW


def letters() -> PreTrainedTokenizerFast:
    """One letter for each token."""
    vocabulary = {chr(ord("a") + token): token for token in range(12)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_stop_strings():
    model = model_of("llava_1.5")
    inputs = text_prompt(model.target.model, 5, seed=1)
    text = model.generate(**inputs, max_new_tokens=NEW)[0, 5:].tolist()
    wanted = "".join(chr(ord("a") + token) for token in text[6:8])
    found = both(model, inputs, stop_strings=[wanted], tokenizer=letters(), eos_token_id=None)
    assert len(found[0]) <= 5 + 8
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(**inputs, stop_strings=["a"])


def test_threads_and_the_target_itself():
    """The target's object and class stay as they are, and generations do not meet."""
    model = model_of("qwen2_5_vl")
    target = model.target.model
    before = dict(vars(target)), type(target)
    inputs = [image_prompt(target, seed, ".a.") for seed in range(3)]
    options = {"max_new_tokens": 12, "repetition_penalty": 1.3}
    expected = [model.generate(**one, **options).tolist() for one in inputs]
    found = [None] * 3

    def work(number):
        found[number] = model.generate(**inputs[number], **options).tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == expected
    assert (dict(vars(target)), type(target)) == before


# --- what is returned ---


class Recorder:
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(value.tolist())

    def end(self):
        self.calls.append("end")


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("eos", [END, None])
def test_a_streamer_gets_what_generate_gives_it(rows, eos):
    model = model_of("qwen2_5_vl")
    inputs = batch_of(prompts_of(model.target.model)[:rows])
    ours, theirs = Recorder(), Recorder()
    options = {"max_new_tokens": NEW, "eos_token_id": eos, "stopping_criteria": [AfterThree()]}
    model.generate(**inputs, **options, streamer=ours)
    model.target.model.generate(**reference_inputs(model.target.model, inputs), **options, streamer=theirs)
    assert ours.calls == theirs.calls


@pytest.mark.parametrize("rows", [1, 4])
def test_scores_and_logits(rows):
    """Of the tokens of an answer; behind its end generate() has whatever padding brings, and zeros are here."""
    model = model_of("llava_1.5")
    inputs = batch_of(prompts_of(model.target.model)[:rows])
    options = {"max_new_tokens": NEW, "eos_token_id": END, "repetition_penalty": 1.3, "return_dict_in_generate": True}
    options |= {"output_scores": True, "output_logits": True}
    ours = model.generate(**inputs, **options)
    theirs = model.target.model.generate(**inputs, **options)
    assert isinstance(ours, SpecOutput) and torch.equal(ours.sequences, theirs.sequences)
    length = inputs["input_ids"].shape[1]
    answers = [row[length:].tolist() for row in ours.sequences]
    ends = [answer.index(END) + 1 if END in answer else len(answer) for answer in answers]
    assert ours.new_tokens == ends
    for name in ("scores", "logits"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert len(found) == len(expected) == ours.sequences.shape[1] - length
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            for row, end in enumerate(ends):
                wanted = other[row] if place < end else torch.zeros_like(other[row])
                torch.testing.assert_close(one[row], wanted, rtol=1e-4, atol=1e-4)
    penalised = model.generate(**inputs, **options | {"output_scores": False, "output_logits": False})
    assert penalised.scores is None and torch.equal(penalised.sequences, theirs.sequences)
    plain = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
    assert plain.scores is None and plain.logits is None
    assert plain.seconds > 0 and plain.rounds >= 1 and 0 <= plain.tau <= 4
    without = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True, speculate=False)
    assert without.tau is None and without.rounds == NEW - 1 and torch.equal(without.sequences, plain.sequences)


# --- sampling ---


@pytest.mark.parametrize("name", [None, *SAMPLING])
def test_sampled_scores_are_those_of_generate(name):
    """The distributions along a sampled answer, by transformers' own processing of its plain logits."""
    model = model_of("llava_1.5")
    inputs = text_prompt(model.target.model, 5, seed=1)
    options = {"do_sample": True, "max_new_tokens": NEW, "return_dict_in_generate": True, "repetition_penalty": 1.2}
    options |= {"output_scores": True, "output_logits": True} | ({name: SAMPLING[name]} if name else {})
    ours = model.generate(**inputs, **options, seed=3)
    texts = [ours.sequences[:, : 5 + place] for place in range(NEW)]
    with torch.inference_mode():
        for text, logits, scores in zip(texts, ours.logits, ours.scores, strict=True):
            known = {"input_ids": text, "attention_mask": torch.ones_like(text)}
            theirs = model.target.model.generate(**known, **options | {"max_new_tokens": 1})
            torch.testing.assert_close(theirs.logits[0], logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(theirs.scores[0], scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3, "top_p": 0.9}, {"min_new_tokens": 6}])
def test_a_seed_says_one_text(options):
    """With any tree and without one, alone and in a batch, with processors that look at the text and without."""
    model = model_of("qwen2_5_vl")
    prompts = prompts_of(model.target.model)
    options = {"do_sample": True, "max_new_tokens": NEW, "eos_token_id": END, "pad_token_id": 0} | options
    batch = batch_of(prompts)
    expected = model.generate(**batch, **options, seed=[5, 9, 2, 4], speculate=False)
    for tree in ("2/0/1", "12/3/4", "30/3/8", "auto"):
        assert torch.equal(model.with_tree(tree).generate(**batch, **options, seed=[5, 9, 2, 4]), expected)
    if "repetition_penalty" not in options:  # padding is part of the text that is penalised
        length = batch["input_ids"].shape[1]
        for row, (prompt, seed) in enumerate(zip(prompts, [5, 9, 2, 4], strict=True)):
            alone = model.generate(**prompt, **options, seed=seed)[0, prompt["input_ids"].shape[1] :]
            assert torch.equal(alone, expected[row, length : length + len(alone)])
    counted = model.generate(**batch, **options, seed=7)
    assert torch.equal(counted, model.generate(**batch, **options, seed=[7, 8, 9, 10]))


def test_several_sequences_of_a_prompt():
    model = model_of("llava_1.5")
    prompts = prompts_of(model.target.model)[:2]
    options = {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 3}
    batch = batch_of(prompts)
    found = model.generate(**batch, **options, seed=1, repetition_penalty=1.2)
    assert found.shape == (6, batch["input_ids"].shape[1] + 8)
    assert torch.equal(found[:, : -8], batch["input_ids"].repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in found[:3].tolist()}) > 1
    three = {name: torch.cat([value] * 3) for name, value in prompts[1].items()}
    one_each = model.generate(**three, **options | {"num_return_sequences": 1}, seed=1)
    assert torch.equal(model.generate(**prompts[1], **options, seed=1), one_each)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "num_beams=3 asks for beam search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6 asks for contrastive search"),
        ({"prompt_lookup_num_tokens": 4}, "prompt_lookup_num_tokens=4 asks for assisted decoding"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5 asks for classifier-free guidance"),
        ({"output_attentions": True}, "output_attentions=True asks for attentions"),
        ({"output_hidden_states": True}, "output_hidden_states=True asks for hidden states"),
        ({"dola_layers": "high"}, "dola_layers='high' asks for DoLa"),
        ({"seed": "x", "do_sample": True}, "seed must be an int"),
        ({"seed": [1, 2], "do_sample": True}, "seed has 2 entries, expected one for each of the 1 rows"),
        ({"inputs_embeds": torch.zeros(1, 2, 64)}, "inputs_embeds"),
        ({"assistant_model": object()}, "does not take assistant_model"),
        ({"do_samples": True}, r"generate\(\) got an unexpected keyword argument 'do_samples'"),
        ({"max_length": 3}, "max_length"),
    ],
)
def test_what_is_refused(options, message):
    model = model_of("llava_1.5")
    with pytest.raises((ValueError, TypeError), match=message):
        model.generate(**text_prompt(model.target.model, 5, seed=1), **options)


def test_without_a_draft():
    model = model_of("llava_1.5")
    plain = SpecModel(model.target)
    inputs = text_prompt(model.target.model, 5, seed=1)
    with pytest.raises(ValueError, match="without a draft head"):
        plain.generate(**inputs)
    assert torch.equal(plain.generate(**inputs, speculate=False), model.generate(**inputs))


def test_synthid_of_one_prompt_and_not_of_a_batch():
    from transformers import SynthIDTextWatermarkingConfig

    model = model_of("llava_1.5")
    prompts = prompts_of(model.target.model)
    config = SynthIDTextWatermarkingConfig(keys=[3, 8, 5], ngram_len=3)
    both(model, prompts[1], watermarking_config=config)
    with pytest.raises(ValueError, match="SynthIDTextWatermarkLogitsProcessor remembers what it has seen"):
        model.generate(**batch_of(prompts), watermarking_config=config)


# --- as a decoding method of generate() itself ---


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56), reason="custom_generate takes no callable"
)
@pytest.mark.parametrize("family", ["llava_1.5", "qwen2_5_vl"])
def test_custom_generate(family):
    model = model_of(family)
    target = model.target.model
    prompts = prompts_of(target)
    options = {"max_new_tokens": NEW, "eos_token_id": END, "repetition_penalty": 1.3}
    options |= {"stopping_criteria": [AfterThree()]}
    for inputs in (prompts[0], batch_of(prompts)):
        inputs = reference_inputs(target, inputs)
        expected = target.generate(**inputs, **options)
        assert torch.equal(target.generate(**inputs, **options, custom_generate=model.generate_with), expected)
        drawn = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 6, "pad_token_id": 0, "seed": 3}
        sampled = target.generate(**inputs, **drawn, custom_generate=model.generate_with)
        assert torch.equal(sampled, model.generate(**inputs, **drawn))
    other = model_of(family, 1).target.model
    with pytest.raises(ValueError, match="for the target of this SpecModel alone"):
        other.generate(**inputs, custom_generate=model.generate_with)
