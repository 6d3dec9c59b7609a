"""Which samples are held out."""

import torch

from vispec.ge_data.sample_file import Tokens, write_sample
from vispec.train.samples import find_samples, hold_out


def test_what_a_sample_says_decides_whether_it_is_held_out(tmp_path):
    """About a twentieth, whatever the files are called, however many they are and whatever is read beside them."""
    for index in range(300):
        tokens = Tokens(torch.arange(index, index + 9), torch.ones(9, dtype=torch.bool), [])
        for folder, name in (("a", index), ("b", 400 - index)):
            write_sample(tmp_path / folder / f"{name:08d}.safetensors", tokens)
    a, b = [find_samples([tmp_path / folder]) for folder in "ab"]
    train, held = hold_out(a)
    assert sorted(train + held) == a and 5 <= len(held) <= 30
    assert hold_out(a + b)[1] == held + hold_out(b)[1]
    assert [int(path.stem) for path in held] == [400 - int(path.stem) for path in reversed(hold_out(b)[1])]
    assert [path for path in held if path in a[50:]] == hold_out(a[50:])[1]
    few = train[:6]
    assert hold_out(few[:1]) == (few[:1], [])
    assert len(hold_out(few[:2])[1]) == len(hold_out(few)[1]) == 1
    assert hold_out(few)[1] == hold_out(few[::-1])[1]
    pictures = [tmp_path / "c" / f"{index:08d}.safetensors" for index in range(8)]
    for index, path in enumerate(pictures):
        tokens = Tokens(torch.arange(9), torch.ones(9, dtype=torch.bool), [])
        write_sample(path, tokens, {"image": f"{index}.png"})
    assert hold_out(pictures)[1] == hold_out(pictures[::-1])[1], "an image's name counts too"
