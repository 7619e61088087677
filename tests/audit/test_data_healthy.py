"""Healthy batches: nothing is said of them, however odd they look."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nanhunt
from nanhunt.audit.data import audit_data


def lengths_mask(number: int, length: int) -> Tensor:
    return torch.arange(length)[None] < torch.randint(5, length, (number, 1))


def ragged(number: int = 8, length: int = 200, features: int = 16) -> Tensor:
    return torch.randn(number, length, features) * lengths_mask(number, length)[..., None]


def waveforms(number: int = 8, channels: int = 19, length: int = 640) -> Tensor:
    return torch.randn(number, channels, length).cumsum(2) / 10


def spectrogram(log: bool) -> Tensor:
    power = torch.stft(torch.randn(8, 16_000), 256, window=torch.hann_window(256), return_complex=True).abs().square()
    return power.clamp(min=1e-1).log10().clamp(min=-0.5) if log else power


def digits() -> Tensor:
    images = torch.zeros(32, 1, 28, 28)
    for image in images:
        image[0, 8:20, 8:20] = torch.rand(12, 12)
    return images


def bordered() -> Tensor:
    images = torch.rand(8, 3, 32, 32)
    images[:, :, :6] = 0.0
    images[:, :, -6:] = 0.0
    images[:, :, 10:14] = 1.0
    return images


def grey_as_colour() -> Tensor:
    return torch.rand(8, 1, 32, 32).expand(8, 3, 32, 32).contiguous()


def bag_of_words() -> Tensor:
    return torch.distributions.Poisson(0.1).sample((64, 300))


def tabular() -> Tensor:
    scales = torch.tensor([1.0, 40.0, 3e4, 0.01, 5.0, 700.0, 2e3, 0.2])
    return torch.randn(64, 8) * scales + scales


def sparse_events() -> Tensor:
    events = torch.randn(8, 32, 640) * (torch.rand(8, 32, 640) < 0.02)
    events[:, ::5] = 0.0
    return events


def steps() -> Tensor:
    levels = torch.randn(8, 6, 20)
    return levels.repeat_interleave(32, dim=2)


def speech() -> Tensor:
    loudness = torch.logspace(-2, 0, 8)[:, None]
    sound = torch.randn(8, 16_000) * loudness
    sound[:, 4000:9000] = 0.0
    return sound


def half_waves() -> Tensor:
    return F.relu(torch.randn(8, 16, 200))


def dna() -> Tensor:
    return F.one_hot(torch.randint(0, 4, (8, 500)), 4).float().transpose(1, 2)


def with_trigger() -> Tensor:
    signal = waveforms()
    signal[:, -1] = (torch.rand(8, 640) > 0.9).float()
    return signal


def quiet_and_loud() -> Tensor:
    return waveforms() * torch.logspace(-1, 1, 19)[:, None] * torch.logspace(-1, 1, 8)[:, None, None]


def times_beside(values: Tensor) -> dict[str, Tensor]:
    return {"times": torch.linspace(0, 1, values.shape[-1]).expand(len(values), -1).contiguous(), "x": values}


@dataclass
class Graph:
    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor
    y: Tensor


HEALTHY = {
    "waveforms": lambda: waveforms(),
    "padded sequences": lambda: (ragged(), torch.randint(0, 2, (8,))),
    "padded sequences with a mask": lambda: {"x": ragged(8, 2000), "mask": lengths_mask(8, 2000)},
    "short padded sequences of many features": lambda: ragged(8, 40, 64),
    "log spectrogram with a floor": lambda: spectrogram(log=True),
    "power spectrogram": lambda: spectrogram(log=False),
    "digits": lambda: (digits(), torch.randint(0, 10, (32,))),
    "images with borders": lambda: bordered(),
    "grey images in colour": lambda: grey_as_colour(),
    "standardised images": lambda: torch.randn(8, 3, 32, 32),
    "integer images": lambda: torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8),
    "bag of words": lambda: (bag_of_words(), torch.randint(0, 2, (64,))),
    "tabular features of different units": lambda: (tabular(), torch.randn(64)),
    "a rare yes or no beside measurements": lambda: torch.cat([torch.randn(900, 8), torch.eye(900)[:, :1]], dim=1),
    "one-hot sequences": lambda: dna(),
    "sparse events": lambda: sparse_events(),
    "step functions": lambda: steps(),
    "speech with silence": lambda: speech(),
    "features after relu": lambda: half_waves(),
    "a trigger channel": lambda: with_trigger(),
    "channels and samples of many sizes": lambda: quiet_and_loud(),
    "a grid of times for all": lambda: times_beside(torch.randn(8, 100)),
    "a state of zeros": lambda: {"x": torch.randn(8, 100), "state": torch.zeros(8, 32)},
    "tokens": lambda: {
        "input_ids": torch.randint(0, 50_000, (8, 64)),
        "attention_mask": torch.ones(8, 64),
        "labels": torch.randint(0, 50_000, (8, 64)),
    },
    "masked language labels": lambda: {
        "input_ids": torch.randint(0, 100, (8, 64)),
        "labels": torch.where(torch.rand(8, 64) < 0.15, torch.randint(0, 100, (8, 64)), -100),
    },
    "patches of a transformer": lambda: torch.randn(4, 197, 768),
    "half precision": lambda: torch.randn(8, 4, 256).half(),
    "bfloat16": lambda: torch.randn(8, 4, 256).bfloat16(),
    "a graph": lambda: Graph(
        torch.randn(40, 16), torch.randint(0, 40, (2, 120)), torch.rand(120, 1), torch.randint(0, 2, (40,))
    ),
    "soft labels": lambda: (torch.randn(64, 20), torch.randn(64, 5).softmax(1)),
    "several labels": lambda: (torch.randn(64, 20), (torch.rand(64, 6) > 0.5).float()),
    "hinge labels": lambda: (torch.randn(64, 20), torch.randint(0, 2, (64,)) * 2 - 1),
    "regression": lambda: (torch.randn(64, 20), torch.randn(64, 1)),
    "long-tailed classes": lambda: (torch.randn(64, 20), torch.tensor([0] * 60 + [7, 3, 3, 9])),
    "numpy": lambda: (np.random.default_rng(0).normal(size=(32, 10)), np.arange(32) % 4),
    "video": lambda: torch.rand(2, 3, 8, 16, 16),
    "one number each": lambda: (torch.randn(32), torch.randint(0, 2, (32,))),
    "nested": lambda: {"eeg": {"left": waveforms(), "right": waveforms()}, "age": torch.rand(8, 1)},
    "batches": lambda: [(torch.randn(8, 3, 100), torch.randint(0, 3, (8,))) for _ in range(6)],
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_said_of_a_healthy_batch(name):
    report = audit_data(HEALTHY[name]())
    assert [(found.code, found.message) for found in report.findings] == []
    assert not [skip for skip in report.skips if "failed" in skip.reason]


def test_a_data_loader_is_only_read_and_the_random_generators_are_put_back():
    data = torch.utils.data.TensorDataset(torch.randn(64, 3, 100), torch.randint(0, 2, (64,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    before, state = data.tensors[0].clone(), torch.get_rng_state()
    report = nanhunt.audit_data(loader)
    assert report.findings == ()
    assert dict(report.facts)["batches"] == "8"
    assert torch.equal(data.tensors[0], before)
    assert torch.equal(torch.get_rng_state(), state)
