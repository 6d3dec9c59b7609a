"""Time to the first token with and without kept prompts, on the embedded target."""

import json

from vispec.demo import prefixes


def test_what_is_asked_next_is_read_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prefixes, "ANSWER_TOKENS", 8)
    assert prefixes.main(["--pages", "0", "--repetitions", "1", "--json", str(tmp_path / "rows.json")]) == 0
    following, other = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert following["same_token"] and other["same_token"]
    assert 0 < other["reused"] < following["reused"] < following["tokens"]
    assert f"| the next turn | 0 | {following['tokens']} | {following['reused']} |" in capsys.readouterr().out
