"""What `import vispec` costs and shows, and what is packaged."""

import io
import runpy
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import setuptools
from tqdm import tqdm

import vispec
from vispec.cli import run_cli
from vispec.model.spec_model import SpecModel

ROOT = Path(__file__).parents[1]

DECODE = """
import sys, vispec
assert "SpecModel" in dir(vispec), dir(vispec)
assert not {"torch", "transformers"} & sys.modules.keys()
pair = ("tests/golden/llava_next/target", "tests/golden/llava_next/draft_vispec")
model = vispec.SpecModel.from_pretrained(*pair, tree=vispec.TreeShape(12, 3, 4))
import torch
assert model.specgenerate(torch.tensor([[5, 6, 7]]), max_new_tokens=4).shape[1] > 3
print(sorted({"datasets", "fastchat", "matplotlib", "ray"} & sys.modules.keys()))
"""


def test_decoding_imports_what_it_needs():
    done = subprocess.run([sys.executable, "-c", DECODE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


def test_what_type_checkers_see_is_what_there_is(monkeypatch):
    monkeypatch.setattr(typing, "TYPE_CHECKING", True)
    seen = runpy.run_path(str(ROOT / "vispec" / "__init__.py"))
    assert {name: seen[name] for name in vispec.__all__} == {name: getattr(vispec, name) for name in vispec.__all__}
    assert vispec.SpecModel is SpecModel


def test_what_is_packaged_beside_the_code(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    packaged = given["package_data"]
    assert "py.typed" in packaged["vispec"]
    for package, patterns in packaged.items():
        for pattern in patterns:
            assert any(path.is_file() for path in ROOT.joinpath(*package.split(".")).glob(pattern)), pattern


def test_a_terminal_that_lacks_a_character_ends_no_run(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit) as done:
        run_cli(lambda: print("é τ …"))
    terminal.flush()
    assert (done.value.code, terminal.buffer.getvalue()) == (0, b"\xe9 ? ?\n")


def test_an_error_has_a_line_of_its_own_where_a_bar_is_drawn(capsys):
    def main():
        bar = tqdm(total=3, disable=False, mininterval=0)
        bar.update()
        raise ValueError("wrong")

    with pytest.raises(SystemExit) as done:
        run_cli(main)
    assert done.value.code == 1 and "\rerror: wrong\n" in capsys.readouterr().err
