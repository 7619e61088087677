"""Small models of several kinds, with groups as they should be."""

import torch
from torch import nn


class Perceptron(nn.Module):
    """A norm that is called ``seq.1`` and a linear map that is called ``dbnet``."""

    def __init__(self):
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU())
        self.dbnet = nn.Linear(8, 3)

    def forward(self, x):
        return self.dbnet(self.seq(x))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Flatten()
        )
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.layers(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(self.tokens(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class OwnNorm(nn.Module):
    """A norm of a class whose name does not say so."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Residual(nn.Module):
    """A foreign norm, a learned scale and a positional embedding that is a bare parameter."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 5, 8))
        self.inner = nn.Linear(8, 8)
        self.scale = OwnNorm(8)
        self.share = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = x + self.place
        return self.head((x + self.share * self.inner(self.scale(x))).mean(1))


class StateSpace(nn.Module):
    """Parameters marked to be spared."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.A_log = nn.Parameter(torch.zeros(8))
        self.A_log._no_weight_decay = True
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.first(x) * torch.exp(-self.A_log.exp()))


INPUTS = {
    Perceptron: lambda: torch.randn(4, 6),
    Convolution: lambda: torch.randn(4, 2, 8, 8),
    Attention: lambda: torch.randint(0, 20, (4, 5)),
    Recurrent: lambda: torch.randn(4, 5, 4),
    Residual: lambda: torch.randn(4, 5, 8),
    StateSpace: lambda: torch.randn(4, 4),
}

SPARED = {"scale.weight", "share", "place", "A_log"}


def batch_for(model):
    return {"x": INPUTS[type(model)](), "y": torch.tensor([0, 1, 2, 0])}


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def grouped(model, weight_decay=0.05):
    """Groups written out by shape and module, independently of what the audit knows."""
    tables = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim >= 2 and id(p) not in tables and name not in SPARED]
    chosen = {id(p) for p in decayed}
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for _, p in named if id(p) not in chosen], "weight_decay": 0.0},
    ]


def codes(report):
    return [finding.code for finding in report.findings]


def finding(report, code):
    (found,) = (one for one in report.findings if one.code == code)
    return found
