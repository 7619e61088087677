"""What the tests of capture files share."""

import pytest
import torch

from nanhunt.capture.format import Capture, checksum, plain, read_capture
from nanhunt.errors import CaptureError


def capture(payload=None, **meta) -> Capture:
    return Capture({"step": 19, "target": None, **meta}, plain({"batches": [payload]} if payload is not None else {}))


def refusal(path) -> str:
    with pytest.raises(CaptureError) as caught:
        read_capture(path)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


def same(one, other) -> bool:
    """Equal bit for bit, NaN included, with the same types all the way down."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and checksum(one) == checksum(other)
    if isinstance(one, dict):
        return type(other) is dict and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)
