"""Data generation by actors, in one process; tests/test_actors.py has some of Ray."""

from argparse import Namespace

import pytest
from fake_ray import ActorDied, OneProcess
from tiny_rows import contents, generate, manifest_of, write_rows

from vispec import ray_pool
from vispec.ge_data.actors import Actor
from vispec.ge_data.maker import Maker
from vispec.ge_data.run_folder import RunFolder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"), images=6)


@pytest.fixture
def ray(monkeypatch):
    ray = OneProcess()
    monkeypatch.setattr(ray_pool, "start_ray", lambda flag: ray)
    return ray


def test_a_batch_that_actors_die_of_is_given_up(data, ray, tmp_path, monkeypatch, capsys):
    make = Maker.make

    def deadly(self, batch):
        if 4 in batch:
            raise ActorDied
        return make(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Maker, "make", deadly)
        assert generate("image", "llava", data, tmp_path / "out", "--ray", "2") == 3
    assert len(ray.killed) == 2
    reason, rows = "2 actors died while they made its batch", {"count": 3, "rows": [3, 4, 5]}
    assert manifest_of(tmp_path / "out")["failed"] == {reason: rows}
    assert "error: 3 row(s) failed; the same command tries them again" in capsys.readouterr().err
    for out in ("out", "alone"):
        assert generate("image", "llava", data, tmp_path / out, *(["--ray"] if out == "out" else [])) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_run_that_lacks_nothing_needs_no_actor(data, tmp_path, monkeypatch):
    assert generate("text", "llava", data, tmp_path / "out", "--store", "tokens") == 0
    monkeypatch.setattr(ray_pool, "start_ray", lambda flag: pytest.fail("Ray was started"))
    assert generate("text", "llava", data, tmp_path / "out", "--store", "tokens", "--ray") == 0


def test_a_machine_that_has_other_folders_is_refused(tmp_path):
    folder = RunFolder(tmp_path, {})
    with folder.marked() as mark:
        with pytest.raises(ValueError, match="gone: no such folder on "):
            Actor(Namespace(), folder, tmp_path / "gone", mark, 1)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"--outdir {tmp_path}: expected a shared file system, "):
        Actor(Namespace(), folder, None, mark, 1)


def test_actors_with_another_target_are_refused(data, ray, tmp_path, monkeypatch):
    """The command and its actors may be on machines of which only some have the newest weights."""
    there = {"model": "target", "revision": "old", "dtype": None}
    monkeypatch.setattr(Actor, "loaded_settings", lambda self: {"target": there})
    with pytest.raises(ValueError, match="--model .* machines have another target .*revision 'files-.* 'old' now"):
        generate("text", "llava", data, tmp_path / "out", "--store", "tokens", "--ray")
    assert not any((tmp_path / "out").glob("*.safetensors"))
