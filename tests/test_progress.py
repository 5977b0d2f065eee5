"""Bars with the time left: on a terminal, for what takes long, and not one character of them elsewhere."""

import io
import re
import sys
import time

import pytest
import torch

from metrics import common, scores


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A time that a test moves on."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


class Slow:
    """Five images, `seconds` to read each."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def __len__(self):
        return 5

    def batch(self, indices):
        self.clock[0] += self.seconds
        return torch.zeros(1, 1, 4, 4, dtype=torch.uint8)


def watched(stream, clock, monkeypatch, seconds=10.0):
    """What is drawn while 4 images of 5 are read, `seconds` each, and after the fifth."""
    monkeypatch.setattr(sys, "stderr", stream)
    images = scores.FidelityImages(Slow(clock, seconds), False, "scoring")
    during = ""
    for i in range(5):
        images[i]
        during = stream.getvalue() if i == 3 else during
    assert images.bar is None or images.bar.disable
    return during, stream.getvalue()


def test_a_terminal_shows_how_far_and_how_long_and_then_nothing(clock, monkeypatch):
    during, after = watched(Terminal(), clock, monkeypatch)
    last = during.split("\r")[-1]
    assert last.startswith("scoring:") and "4/5" in last and re.search("<00:(09|10),", last)  # are left
    assert after.split("\r")[-1].strip() == ""


def test_what_is_short_shows_none(clock, monkeypatch):
    assert "scoring" not in watched(Terminal(), clock, monkeypatch, seconds=0.3)[1]


def test_a_file_shows_none(clock, monkeypatch):
    assert watched(io.StringIO(), clock, monkeypatch) == ("", "")


def test_other_ranks_show_none(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with common.progress("sampling", 3, shown=False) as bar:
        bar.update()
    assert sys.stderr.getvalue() == ""
