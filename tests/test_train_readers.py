"""Processes that read samples for training, and end before they have read them."""

import os

import pytest
import torch

from vispec.train.samples import without_tracebacks


class Unreadable(torch.utils.data.Dataset):
    """Samples with which a process that reads them ends in one way or another."""

    def __init__(self, end):
        self.end = end

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.end(index)


def same(item):
    return item


def gone(index):
    return open(f"/no/such/folder/{index}")


def unsendable(index):
    """As where there is no shared memory for it: an error when it is handed over."""
    return Unreadable(lambda index: index)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (gone, r"^\[Errno 2\] No such file or directory: '/no/such/folder/0'$"),
        (unsendable, "died or gives nothing, .*--num-workers 0 does without, docker run --shm-size gives more"),
        (lambda index: os._exit(1), "died or gives nothing"),
    ],
)
def test_a_process_that_reads_no_more_is_one_line(end, message):
    loader = torch.utils.data.DataLoader(Unreadable(end), batch_size=None, num_workers=1, collate_fn=same)
    with pytest.raises(ValueError, match=message) as caught:
        list(without_tracebacks(loader))
    assert "\n" not in str(caught.value)


def test_a_bug_in_a_process_that_reads_keeps_its_traceback():
    loader = torch.utils.data.DataLoader(Unreadable(lambda index: 1 // 0), batch_size=None, num_workers=1)
    with pytest.raises(ZeroDivisionError, match="Traceback"):
        list(without_tracebacks(loader))
