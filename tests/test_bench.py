"""The bench: counted bytes and operations, pairs at published sizes, and a report whose parts fit together."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recorded_steps import record
from torch import nn

from vispec import SpecModel
from vispec.cli import UserError
from vispec.evaluation import bench, random_pairs, roofline, round_times
from vispec.evaluation.random_pairs import TARGETS, build_draft, build_target
from vispec.evaluation.roofline import Cost, Rates, attention_cost, pass_cost
from vispec.model import graphs
from vispec.model.shape import TreeShape
from vispec.model.target import Target

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
TEXT_PARAMETERS = {  # decoder and output head, in billions, as the models' cards and names say
    "llava-v1.6-vicuna-7b-hf": 6.74,
    "llava-v1.6-vicuna-13b-hf": 13.02,
    "llava-1.5-7b-hf": 6.74,
    "Qwen2.5-VL-3B-Instruct": 3.09,
    "Qwen2.5-VL-7B-Instruct": 7.62,
    "llama-135m": 0.135,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small buffers, few rounds: what is tested is that times are taken, not what they are."""
    monkeypatch.setattr(roofline, "COPIED_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(roofline, "PRODUCT_SIZE", {"cpu": 16})
    monkeypatch.setattr(round_times, "WARM_UP_ROUNDS", 1)
    monkeypatch.setattr(round_times, "ROUNDS", 3)
    monkeypatch.setattr(bench, "VERIFIED", (1, 4))


def tiny(name: str) -> random_pairs.Sizes:
    """A target's family and special tokens, with a decoder and a tower of a few thousand weights."""
    sizes = TARGETS[name]
    text = {**sizes.text, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if "num_key_value_heads" in text:
        text["num_key_value_heads"] = 2
    if "rope_scaling" in text:
        text["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
    vision = random_pairs._CLIP_TINY
    if sizes.family == "qwen2_5_vl":
        vision = {**sizes.vision, "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
        vision["out_hidden_size"] = 32
    return replace(sizes, text=text, vision=vision, draft=None)


# --- counting ---


def test_a_pass_reads_every_weight_once():
    layer = nn.Linear(4, 6)
    assert pass_cost([layer], rows=3) == Cost(bytes=(24 + 6) * 4, flops=2 * 3 * 24)
    assert pass_cost([layer, layer], rows=3) == pass_cost([layer], rows=3)
    assert pass_cost([layer.to(torch.bfloat16)], rows=1).bytes == (24 + 6) * 2


def test_of_an_embedding_table_only_rows_are_read():
    table, head = nn.Embedding(100, 8), nn.Linear(8, 100, bias=False)
    head.weight = table.weight
    assert pass_cost([table], rows=3) == Cost(bytes=3 * 8 * 4)
    assert pass_cost([head], rows=3) == Cost(bytes=800 * 4, flops=2 * 3 * 800)


def test_attention_reads_keys_and_values():
    # 2 layers, 3 heads of 5 over 1 key head, 7 queries, 11 keys of 2 bytes
    assert attention_cost(2, 3, 1, 5, 7, 11, 2) == Cost(2 * 2 * 1 * 5 * 11 * 2, 2 * 2 * 2 * 3 * 5 * 7 * 11)


def test_the_floor_is_what_takes_longer():
    rates = Rates(bandwidth=100.0, matmul=1000.0)
    assert rates.floor(Cost(bytes=200, flops=1000)) == 2.0
    assert rates.floor(Cost(bytes=200, flops=3000)) == 3.0


# --- random pairs ---


@pytest.mark.parametrize("name", TARGETS)
def test_published_sizes(name):
    target = build_target(TARGETS[name], torch.device("meta"), torch.bfloat16)
    assert {weight.dtype for weight in target.parameters()} == {torch.bfloat16}
    text = Target(target)
    weights = {id(w): w.numel() for part in (text.decoder, text.lm_head) for w in part.parameters()}
    assert sum(weights.values()) / 1e9 == pytest.approx(TEXT_PARAMETERS[name], abs=0.005)
    draft = build_draft(TARGETS[name], target)
    published = json.loads((GOLDEN / "published_draft_shapes.json").read_text())
    published["llava-1.5-7b-hf"] = published["llava-v1.6-vicuna-7b-hf"]
    if name in published:
        assert {n: list(tensor.shape) for n, tensor in draft.state_dict().items()} == published[name]


@pytest.mark.parametrize("name", ["llava-v1.6-vicuna-7b-hf", "Qwen2.5-VL-3B-Instruct", "llama-135m"])
def test_random_pairs_decode(name):
    torch.manual_seed(0)
    target = build_target(tiny(name), CPU, torch.float32)
    draft = build_draft(tiny(name), target)
    assert draft.embed_tokens.weight is target.get_input_embeddings().weight
    model = SpecModel(target, draft, 8, 2, 3)
    ids = torch.randint(1000, (1, 9))
    logits = target(input_ids=ids).logits
    assert logits.isfinite().all() and logits.std() > 0.1
    options = {"max_new_tokens": 6}
    assert torch.equal(model.specgenerate(ids, **options), model.baseline_generate(ids, **options))


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="--random-weights gpt: unknown, expected one of llava"):
        bench.main(["--random-weights", "gpt"])


# --- the command ---


def test_a_loaded_pair(tmp_path, capsys):
    file, trace = tmp_path / "bench.json", tmp_path / "trace.json"
    pair = GOLDEN / "llava_next"
    flags = ["--base-model-path", str(pair / "target"), "--spec-model-path", str(pair / "draft_vispec")]
    flags += ["--prompt-tokens", "20", "--repeats", "2", "--trees", "12/3/4", "4/1/3"]
    assert bench.main([*flags, "--json", str(file), "--profile", str(trace)]) == 0
    result = json.loads(file.read_text())
    assert result["rates"]["bandwidth"] > 0 and result["rates"]["matmul"] > 0
    assert result["verification"].keys() == {"1", "4"}
    assert all(found["identical"] and found["compared"] == 1 + 1 + 3 for found in result["outputs"].values())
    assert result["outputs"].keys() == {"transformers' generate", "12/3/4", "4/1/3"}
    passes = {
        tree: {(part["part"], part["rows"]): part["passes"] for part in found["parts"]}
        for tree, found in result["trees"].items()
    }
    assert passes["12/3/4"] == {
        ("target decoder", 12): 1,
        ("output head", 12): 1,
        ("draft layer", 4): 3,
        ("draft layer", 5): 1,  # the kept path: root and up to depth + 1 nodes
        ("draft output head", 1): 1,
        ("draft output head", 4): 3,
    }
    assert passes["4/1/3"][("draft layer", 3)] == 2  # both the kept path and the one level
    step = result["plain_step"]["seconds"]
    for row in result["trees"].values():
        times = [row["round"], row["tree_building"], *row["parts"]]
        assert all(part["seconds"] > 0 and part["floor"] > 0 for part in times)
        assert sum(part["floor"] for part in row["parts"]) == pytest.approx(row["round"]["floor"])
        known = sum(part["seconds"] for part in row["parts"])
        assert row["everything_else_share"] == pytest.approx(1 - known / row["round"]["seconds"])
        assert row["measured"] is None and row["device_busy_seconds"] is None
        drafted = sum(part["seconds"] for part in row["parts"] if part["part"].startswith("draft"))
        assert row["draft_module_seconds"] == pytest.approx(drafted)
        assert row["round_in_plain_steps"] == pytest.approx(row["round"]["seconds"] / step)
        for found in row["projected"]:
            assert found["kind"] == "projected"
            assert found["speedup"] == pytest.approx((found["tau"] + 1) * step / row["round"]["seconds"])
            over_generate = found["speedup_over_generate"] / found["speedup"]
            assert over_generate == pytest.approx(result["transformers_step"]["seconds"] / step)
    cache = result["trees"]["12/3/4"]["draft_cache"]
    assert cache["text"]["held"] == 20 and cache["with_images"] == {
        "prompt_tokens": 180, "held": 20 + 8, "bytes": 28 * cache["bytes_a_token"]
    }  # fmt: skip
    assert "traceEvents" in json.loads(trace.read_text())
    printed = capsys.readouterr().out
    assert "a round at 12/3/4" in printed and "3 x draft output head, 4 rows" in printed
    assert "of a round after a prompt of 20 tokens" in printed and result["captured"] == "none"
    assert "x plain is the ratio of tokens/s to those of our own plain loop" in printed


def test_end_tokens_end_no_run(monkeypatch, tmp_path):
    """Also of a target to which every token is one."""
    load_pair = bench.load_pair

    def ends_at_once(args):
        model = load_pair(args)
        model.target.eos_token_ids = list(range(model.target.embed_tokens.weight.shape[0]))
        model.target.model.generation_config.eos_token_id = model.target.eos_token_ids
        return model

    monkeypatch.setattr(bench, "load_pair", ends_at_once)
    monkeypatch.setattr(random_pairs, "TARGETS", {"llama-135m": tiny("llama-135m")})
    file = tmp_path / "bench.json"
    flags = ["--trees", "4/1/3", "--dtype", "float32", "--prompt-tokens", "9", "--repeats", "1", "--json", str(file)]
    assert bench.main(["--random-weights", "llama-135m", *flags]) == 0
    outputs = json.loads(file.read_text())["outputs"]
    assert [found["compared"] for found in outputs.values()] == [1 + 1 + 3] * 2


def test_captured_steps_are_timed_as_they_are_replayed(monkeypatch, tmp_path, capsys):
    """What launches operations one by one is in no time of a target whose steps are captured."""
    replays = Counter()

    def capture(step):
        replay = record(step)

        def counted():
            replays["all"] += 1
            replay()

        return counted

    monkeypatch.setattr("vispec.model.target.obstacle", lambda *target: None)
    monkeypatch.setattr(graphs, "cuda_capture", lambda device: capture)
    monkeypatch.setattr(random_pairs, "TARGETS", {"llama-135m": tiny("llama-135m")})
    file = tmp_path / "bench.json"
    flags = ["--trees", "12/3/4", "--dtype", "float32", "--prompt-tokens", "20", "--repeats", "1", "--json", str(file)]
    assert bench.main(["--random-weights", "llama-135m", *flags]) == 0
    result = json.loads(file.read_text())
    assert result["captured"] == "all"
    row = result["trees"]["12/3/4"]
    passes = {(part["part"], part["rows"]): part["passes"] for part in row["parts"]}
    assert passes == {(part, rows): number for number, part, rows in round_times.round_passes(TreeShape(12, 3, 4))}
    assert sum(part["floor"] for part in row["parts"]) == pytest.approx(row["round"]["floor"])
    known = sum(part["seconds"] for part in row["parts"]) + row["tree_building"]["seconds"]
    assert row["device_busy_seconds"] == pytest.approx(known)
    assert row["everything_else_share"] == pytest.approx(1 - known / row["round"]["seconds"])
    assert replays["all"] > len(passes) and all(found["identical"] for found in result["outputs"].values())
    assert "the rest is the host's and the kept path's" in capsys.readouterr().out


def test_random_weights_show_the_published_tau(monkeypatch, tmp_path, capsys):
    name = "llava-v1.6-vicuna-7b-hf"
    monkeypatch.setitem(TARGETS, name, tiny(name))
    file = tmp_path / "bench.json"
    flags = ["--prompt-tokens", "9", "--repeats", "1", "--draft-vocab", "100", "--json", str(file)]
    assert bench.main(["--random-weights", name, *flags]) == 0
    result = json.loads(file.read_text())
    everything, restricted = result["trees"]["30/3/8"], result["trees"]["30/3/8 of 100 tokens"]
    assert everything["draft_bytes"]["draft output head"] == 32064 * 32 * 2
    assert restricted["draft_bytes"]["draft output head"] == 100 * 32 * 2
    assert [part["passes"] for part in restricted["parts"]] == [part["passes"] for part in everything["parts"]]
    assert restricted["round"]["floor"] < everything["round"]["floor"]
    assert result["device"]["dtype"] == "bfloat16" and result["device"]["weights"] == "random"
    found = {row["tau"]: row for row in result["trees"]["30/3/8"]["projected"] if "published_speedup" in row}
    assert found.keys() == {2.98, 2.09}
    assert "projected, published" in found[2.98]["kind"]
    printed = capsys.readouterr().out
    assert "(published: 2.58 over the authors' loop)" in printed
    assert "of what it takes over all tokens" in printed


def test_the_embedded_pair_is_measured_too(monkeypatch, tmp_path):
    monkeypatch.setattr(bench.embedded, "TARGET", GOLDEN / "llava_next" / "target")
    monkeypatch.setattr(bench.embedded, "DRAFT", GOLDEN / "llava_next" / "draft_vispec")
    monkeypatch.setattr(bench, "ANSWER_TOKENS", 8)
    file = tmp_path / "bench.json"
    assert bench.main(["--prompt-tokens", "9", "--repeats", "1", "--json", str(file)]) == 0
    measured = json.loads(file.read_text())["trees"][bench.embedded.TREE_NAME]["measured"]
    assert measured["tau"] > 0 and measured["speedup"] > 0
    assert measured["speedup_over_generate"] > 0 and measured["decode_speedup_over_generate"] > 0
    assert measured["questions"] == measured["identical_questions"] == len(bench.embedded.questions())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base-model-path", "x"], "belong together"),
        (["--random-weights", "llama-135m", "--base-model-path", "x"], "either random or read"),
        (["--random-weights", "llama-135m", "--draft-vocab", "50000"], "--draft-vocab 50000: llama-135m has 49152"),
        (["--random-weights", "llama-135m", "--device-map", "auto"], "--device-map auto: --random-weights needs one"),
        (["--draft-vocab", "50"], "expected --random-weights"),
        (["--prompt-tokens", "5000"], "--prompt-tokens 5000: expected at most"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(UserError, match=message):
        bench.main(flags)
