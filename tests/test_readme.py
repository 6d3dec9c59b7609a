"""The README's Python example runs as it stands, on the embedded pair; its costs are those of the published sizes."""

import json
import re
from math import prod
from pathlib import Path

from vispec.demo import embedded
from vispec.demo.scenes import render, scene_of

GOLDEN = Path(__file__).parent / "golden"
README = Path(__file__).parent.parent / "README.md"


def test_the_python_example_runs(tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    target, draft = embedded.require_weights()
    picture = tmp_path / "x.png"
    render(scene_of("eval", 0)).save(picture)
    for published, local in (
        ("llava-hf/llava-v1.6-vicuna-7b-hf", target),
        ("JLKang/ViSpec-llava-v1.6-vicuna-7b-hf", draft),
        ("x.jpg", str(picture)),
    ):
        assert f'"{published}"' in code
        code = code.replace(f'"{published}"', repr(local))
    exec(compile(code, "README.md", "exec"), {})
    answer, tau = capsys.readouterr().out.strip().rsplit(" ", 1)
    assert answer.endswith("</s>") and float(tau) > 1


def test_what_a_full_size_run_costs():
    """Arithmetic from the shapes of the published heads: stored bytes, trained parameters, memory of a process."""
    text = README.read_text(encoding="utf-8")
    shapes = json.loads((GOLDEN / "published_draft_shapes.json").read_text())
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if " MB | " in line]
    assert len(rows) == 5
    for name, *cells in rows:
        image, sample, everything, tokens, trained, memory = (float(c.split()[0].replace(",", "")) for c in cells)
        wanted = name.lower().replace("llava-1.5", "llava-1.6").replace("llava-1.6", "vicuna").replace(" ", "-")
        (found,) = [dict(entry) for key, entry in shapes.items() if wanted in key.lower()]
        vocabulary, width = found.pop("embed_tokens.weight")
        parameters = sum(map(prod, found.values()))
        length = image + 600
        stored = 2 * length * width + 5 * length + 4 * 600
        assert sample == round(stored / 1e6, 1) and everything == round(68_000 * stored / 1e12, 2)
        assert tokens == round(68_000 * 5 * length / 1e9, 1) and trained == round(parameters / 1e6)
        # float32 weights, gradients and two moments; the frozen table in float32 and the output head in bfloat16
        assert memory == round((16 * parameters + 6 * vocabulary * width) / 2**30, 1)
