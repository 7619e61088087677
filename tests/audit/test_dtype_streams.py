"""A residual stream in half to which layer after layer adds."""

import pytest
import torch
from torch import nn

import nanhunt

BRAIN = torch.bfloat16


class Block(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.norm, self.linear, self.scale = nn.LayerNorm(32), nn.Linear(32, 32), scale

    def forward(self, x):
        return x + self.scale * self.linear(self.norm(x))


def audit(offset, scale, dtype=BRAIN, depth=12):
    torch.manual_seed(0)
    net = nn.Sequential(*(Block(scale) for _ in range(depth))).to(dtype)
    return nanhunt.audit_dtype(net, torch.randn(16, 32, dtype=dtype) + offset)


def test_a_stream_that_takes_nothing_of_its_branches_is_found():
    (found,) = audit(1000.0, 1.0).findings
    assert found.code == "NH417"
    # The first addition begins the total; 11 follow, of 16 x 32 elements.
    assert found.message == "5,632 of 5,632 terms did not change the bfloat16 total they were added to"


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-6, 0.0])
def test_branches_that_are_felt_or_begin_small_are_healthy(scale):
    assert audit(0.0, scale).findings == ()


def test_a_large_stream_in_float32_and_a_shallow_one_are_healthy():
    assert audit(1000.0, 1.0, torch.float32).findings == ()
    assert audit(1000.0, 1.0, depth=7).findings == ()


def test_dropped_branches_are_no_terms():
    class Dropped(Block):
        def forward(self, x):
            return x + torch.zeros_like(self.linear(x))

    net = nn.Sequential(*(Dropped(1.0) for _ in range(12))).to(BRAIN)
    assert nanhunt.audit_dtype(net, torch.randn(16, 32, dtype=BRAIN) + 1000).findings == ()
