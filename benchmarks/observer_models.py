"""The models that observers are measured on, each with its optimizer, a batch and a loss.

The learning rate is so small that the weights stay what they are: hundreds of steps on one batch would otherwise end
in gradients so small that they are subnormal, which the CPU handles many times slower.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from detector.config import PRESETS
from detector.target import DetectorTarget

LEARNING_RATE = 1e-7


@dataclass
class Workload:
    """One training step that can be repeated.

    Attributes:
        block_steps: Steps timed together, so that a block takes about a tenth of a second or more.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    block_steps: int

    def backward(self) -> None:
        """Forward and backward pass."""
        self.loss().backward()

    def update(self) -> None:
        """Moves the weights."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """A whole training step."""
        self.backward()
        self.update()

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


class Transformer(nn.Module):
    """A language model over 256 symbols with causal attention."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, symbols: Tensor) -> Tensor:
        """Logits (batch, length, 256) of symbols (batch, length)."""
        hidden = self.layers(self.tokens(symbols) + self.positions, mask=self.mask, is_causal=True)
        return self.head(self.norm(hidden))


class ResidualBlock(nn.Module):
    """Two convolutions with batch norms beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Feature maps."""
        return functional.relu(self.body(images) + self.shortcut(images))


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    # On the CPU the default is one parameter at a time, which makes a small step twice as long.
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=True)


def _transformer(width: int, layers: int, length: int, batch: int, block_steps: int) -> Workload:
    torch.manual_seed(0)
    model = Transformer(width, layers, length)
    symbols = torch.randint(256, (batch, length + 1))

    def loss() -> Tensor:
        return functional.cross_entropy(model(symbols[:, :-1]).flatten(0, 1), symbols[:, 1:].flatten())

    return Workload(model, _adamw(model), loss, block_steps)


def _tiny() -> Workload:
    return _transformer(width=64, layers=2, length=24, batch=4, block_steps=25)


def _full_transformer() -> Workload:
    return _transformer(width=256, layers=4, length=128, batch=8, block_steps=2)


def _conv() -> Workload:
    torch.manual_seed(0)
    widths = (16, 16, 32, 64, 128)
    blocks = [
        ResidualBlock(before, after, 1 if before == after else 2)
        for narrow, wide in itertools.pairwise(widths)
        for before, after in ((narrow, wide), (wide, wide))
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)]
    model = nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), *blocks, *head)
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))

    def loss() -> Tensor:
        return functional.cross_entropy(model(images), labels)

    return Workload(model, _adamw(model), loss, 3)


def _v3_small() -> Workload:
    target = DetectorTarget(PRESETS["small"])
    model = target.build(0)
    optimizer = target.optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    batch = target.control_batch(0)
    return Workload(model, optimizer, lambda: target.loss(model, batch), 2)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "tiny": _tiny,
    "transformer": _full_transformer,
    "conv": _conv,
    "v3-small": _v3_small,
}
"""By name: makes the same workload each time."""
