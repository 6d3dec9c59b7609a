"""The README's Python example runs as it stands, on the embedded pair."""

import re
from pathlib import Path

from vispec.demo import embedded
from vispec.demo.scenes import render, scene_of

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
