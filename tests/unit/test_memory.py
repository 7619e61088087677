"""The allocator setting of the programs."""

import ctypes
import sys

import pytest

from nanhunt.memory import keep_freed_memory


@pytest.mark.skipif(
    not (sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")),
    reason="needs an allocator with mallopt: the GNU C library",
)
def test_glibc_takes_the_setting():
    assert keep_freed_memory() is True


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
