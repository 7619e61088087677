"""Healthy steps, in float32 and under autocast: no finding."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nanhunt

HALF, BRAIN = torch.float16, torch.bfloat16


class Attention(nn.Module):
    """Masked attention as it is written in four ways."""

    def __init__(self, mask):
        super().__init__()
        self.norm, self.qkv, self.out, self.mask = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32), mask

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if self.mask == "fused":
            return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        scores = q @ k.transpose(-1, -2) / math.sqrt(32)
        if self.mask == "infinite":
            scores = scores.masked_fill(causal, -math.inf)
        elif self.mask == "added in float32":
            scores = scores + torch.zeros(causal.shape).masked_fill(causal, torch.finfo(torch.float32).min)
        else:
            lowest = torch.finfo(scores.dtype).min
            scores = scores + torch.zeros(causal.shape, dtype=scores.dtype).masked_fill(causal, lowest)
        return x + self.out(scores.softmax(-1) @ v)


class Rms(nn.Module):
    """Casts up inside the region without autocast, as it should."""

    def __init__(self):
        super().__init__()
        self.linear, self.gain = nn.Linear(32, 32), nn.Parameter(torch.ones(32))

    def forward(self, x):
        y = self.linear(x)
        with torch.autocast("cpu", enabled=False):
            z = y.float()
            z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)
        return z * self.gain


class Scaled(nn.Module):
    """A 0-dim float32 temperature times half features."""

    def __init__(self):
        super().__init__()
        self.linear, self.log_scale = nn.Linear(32, 10), nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, x):
        return self.log_scale.exp() * self.linear(x).tanh()


class Scatter(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 10)

    def forward(self, x):
        x = self.linear(x)
        neighbours = torch.arange(400) % x.shape[0]
        return torch.zeros_like(x).index_add(0, neighbours.flip(0), x[neighbours])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        hidden = torch.zeros(x.shape[0], 32)
        total = torch.zeros(x.shape[0], 32)
        for _ in range(20):
            hidden = 0.9 * hidden + self.linear(x)
            total = total + hidden
        return total


class Eigen(nn.Module):
    """A graph of zeros and ones loses nothing in half."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 10)

    def forward(self, x):
        y = self.linear(x)
        adjacency = (torch.eye(8).roll(1, 0) + torch.eye(8).roll(-1, 0)).to(y.dtype)
        return y[:8] + torch.linalg.eigh(adjacency.float()).eigenvectors[:, :1]


def conv():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3), nn.GroupNorm(4, 16),
        nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def language_model(*masks):
    return nn.Sequential(
        nn.Embedding(50, 32),
        *(Attention(mask) for mask in masks or ("infinite", "fused", "added in float32", "lowest")),
        nn.LayerNorm(32),
        nn.Linear(32, 50),
    )


ROWS = torch.linspace(-2, 2, 64 * 32).view(64, 32).sin()
TOKENS = torch.arange(8 * 16).view(8, 16) * 7 % 50
MODELS = {
    "convolutions": (conv, lambda: torch.randn(8, 3, 16, 16)),
    "language model": (language_model, lambda: TOKENS),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 12, None, False),
        lambda: ROWS.view(8, 8, 32),
    ),
    "rms norm": (Rms, lambda: ROWS),
    "temperature": (Scaled, lambda: ROWS),
    "scatter": (Scatter, lambda: ROWS),
    "recurrent": (Recurrent, lambda: ROWS),
    "eigenvectors of a graph": (Eigen, lambda: ROWS),
    "data read as float64": (lambda: nn.Sequential(nn.Linear(32, 8)), lambda: ROWS.double()),
}


def loss(model, batch):
    outputs = model(batch.float() if batch.dtype == torch.float64 else batch)
    if batch.dtype == torch.int64:
        return F.cross_entropy(outputs.flatten(0, 1), batch.flatten())
    return F.mse_loss(outputs, torch.zeros_like(outputs))


def under(dtype):
    def region(model, batch):
        with torch.autocast("cpu", dtype=dtype):
            return loss(model, batch)

    return region


@pytest.mark.parametrize("dtype", [None, BRAIN, HALF], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_healthy_step_has_no_finding(name, dtype):
    build, batch = MODELS[name]
    report = nanhunt.audit_dtype(build(), batch(), loss=loss if dtype is None else under(dtype))
    assert [(finding.code, finding.message) for finding in report.findings] == []
    assert report.skips == ()
    assert len(report.passes) == 11
    assert report.absence


@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=["bfloat16", "float16"])
def test_of_a_model_that_is_cast_whole_only_the_loss_is_said(dtype):
    report = nanhunt.audit_dtype(language_model("infinite", "lowest").to(dtype), TOKENS, loss=loss)
    assert [(finding.code, finding.severity) for finding in report.findings] == [("NH413", "warning")]


def test_the_same_with_a_loss_in_float32_is_silent():
    def in_float32(model, batch):
        return F.cross_entropy(model(batch).float().flatten(0, 1), batch.flatten())

    report = nanhunt.audit_dtype(language_model("infinite", "lowest").bfloat16(), TOKENS, loss=in_float32)
    assert (report.findings, report.skips) == ((), ())
