"""Animals that differ in their model: layers, outputs, custom operations."""

import random
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from zoo_entry import (
    Entry,
    images,
    mean_square,
    normal,
    numbers,
    rows,
    seeded,
    sgd,
)

from detector.config import PRESETS
from detector.target import DetectorTarget


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 1))


def conv_net() -> nn.Module:
    features = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.2))
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(36, 1))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)) for _ in range(2))
        self.head = nn.Linear(4, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images).relu_()
        for block in self.blocks:
            residual = block(hidden)
            residual += hidden
            hidden = residual.relu_()
        return self.head(hidden.mean(dim=(2, 3)))


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(5, 6), nn.Linear(3, 5)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(rows).chunk(2, dim=-1)
        latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decode(latent), mean, log_variance


def evidence_bound(model: nn.Module, rows: Tensor) -> Tensor:
    decoded, mean, log_variance = model(rows)
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
    return nn.functional.mse_loss(decoded, rows) + 1e-2 * divergence


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, rows: Tensor) -> dict[str, Any]:
        logits = self.linear(rows)
        return {"logits": logits, "best": logits.argmax(-1), "name": "small", "rest": [None, logits.detach()]}


@dataclass
class Output:
    logits: Tensor
    count: int


class DataclassOutput(DictOutput):
    def forward(self, rows: Tensor) -> Output:
        return Output(self.linear(rows), len(rows))


class ModelOutput(OrderedDict):
    """An ordered dict whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class OrderedOutput(DictOutput):
    def forward(self, rows: Tensor) -> ModelOutput:
        return ModelOutput(logits=self.linear(rows), hidden=None)


class KwargsOnly(DictOutput):
    def forward(self, *, rows: Tensor, scale: float = 1.0) -> Tensor:
        return self.linear(rows) * scale


class Checkpointed(nn.Module):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first, self.block = nn.Linear(5, 8), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh())

    def forward(self, rows: Tensor) -> Tensor:
        return checkpoint(self.block, self.first(rows), use_reentrant=self.use_reentrant)


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value * value.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        half = value.sigmoid()
        return gradient * half * (1 + value * (1 - half))


class CustomFunction(DictOutput):
    def forward(self, rows: Tensor) -> Tensor:
        return _Swish.apply(self.linear(rows))


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.randn(3, dtype=torch.complex64)), nn.Linear(5, 1)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(rows) * self.filter, n=5))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 4)
        self.experts = nn.ModuleList(nn.Linear(5, 1) for _ in range(4))

    def forward(self, rows: Tensor) -> Tensor:
        # The fourth expert never gets a row, and so never a gradient.
        weights, chosen = self.gate(rows)[:, :3].softmax(-1).topk(2)
        result = rows.new_zeros(len(rows), 1)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            if len(row):
                result = result.index_add(0, row, weights[row, place, None] * expert(rows[row]))
        return result


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(5, 5)
        self.alias, self.act = self.shared, nn.Tanh()
        self.back = nn.Parameter(torch.randn(5))

    def forward(self, rows: Tensor) -> Tensor:
        return self.alias(self.act(self.shared(rows))) @ self.shared.weight.t() * self.back


class GivesItsParameter(nn.Module):
    """Modules whose input or output is a parameter itself, as a learned query or position is."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.norm = nn.ParameterList([torch.randn(3, 5)]), nn.LayerNorm(5)

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.norm(self.queries[0]).t()


def spectral() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 1))


def weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 1))


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(5, 6), nn.LeakyReLU(inplace=True)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.linear(rows)
        left, right = hidden[:, :3], hidden.view(-1, 6)[:, 3:]
        right.mul_(0.5)
        hidden[0] += 1
        self.act(left)
        return hidden


class StaleView(DictOutput):
    """Gives a view of what is written to afterwards; torch renews its place in the graph when it is next asked for."""

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.linear(rows)
        result = hidden[:, :2]
        hidden += 1
        return result


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(5, 5), nn.GRUCell(5, 5)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        nodes, (senders, receivers) = batch
        gathered = torch.zeros_like(nodes).index_add_(0, receivers, self.message(nodes)[senders])
        return self.update(gathered, nodes)


class OtherGenerators(DictOutput):
    def forward(self, rows: Tensor) -> Tensor:
        jitter = random.random() + float(np.random.rand())  # noqa: NPY002 - the global generator is what is tested
        return self.linear(rows) * jitter


class Ranks(DictOutput):
    def forward(self, rows: Tensor) -> Tensor:
        logits = self.linear(rows)
        middle = logits.quantile(0.5, dim=0)
        return logits.sort(dim=0).values[:3] - middle + logits.topk(2, dim=0).values.sum() + logits.cummax(0).values[-1]


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 1)).double()


class RunningBest(DictOutput):
    """Keeps a lowest loss that starts at inf and a highest value that starts at -inf, both on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lowest", torch.tensor(torch.inf))
        self.register_buffer("highest", torch.full((3,), -torch.inf))

    def forward(self, rows: Tensor) -> Tensor:
        logits = self.linear(rows)
        self.highest.copy_(torch.maximum(self.highest, logits.detach().amax(0)))
        return logits


@torch.library.custom_op("nanhunt_zoo::cube", mutates_args=())
def _cube(value: Tensor) -> Tensor:
    return value**3


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_cube.register_autograd(lambda ctx, grad: grad * 3 * ctx.saved_tensors[0] ** 2, setup_context=_keep)


class CustomOp(DictOutput):
    def forward(self, rows: Tensor) -> Tensor:
        return _cube(self.linear(rows))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 1))


_SHRUNK = replace(
    PRESETS["small"], model=replace(PRESETS["small"].model, tcn_channels=(4, 4, 6, 8), node_features=8, gnn_layers=1)
)
_DETECTOR = DetectorTarget(_SHRUNK)


def windows(seed: int) -> dict[str, Tensor]:
    return {"windows": normal(1, 19, 48, seed=seed), "labels": (normal(1, 48, seed=seed + 1) > 0).float()}


def graph(seed: int) -> tuple[Tensor, Tensor]:
    return rows(seed), numbers(2, 9, seed=seed, below=6)


def _logits(model: nn.Module, batch: Any) -> Tensor:
    output = model(batch)
    return (output["logits"] if isinstance(output, dict) else output.logits).square().mean()


def _by_keyword(model: nn.Module, batch: Tensor) -> Tensor:
    return model(rows=batch, scale=2.0).square().mean()


def _lowest_kept(model: RunningBest, batch: Tensor) -> Tensor:
    loss = model(batch).square().mean()
    model.lowest.copy_(torch.minimum(model.lowest, loss.detach()))
    return loss


MODELS = (
    Entry("mlp", seeded(mlp), rows, mean_square),
    Entry("conv-net", seeded(conv_net), images, mean_square),
    Entry("resnet-in-place", seeded(ResNet), images, mean_square, sgd),
    Entry("vae", seeded(Vae), rows, evidence_bound),
    Entry("dict-output", seeded(DictOutput), rows, _logits),
    Entry("dataclass-output", seeded(DataclassOutput), rows, _logits),
    Entry("ordered-dict-output", seeded(OrderedOutput), rows, _logits),
    Entry("kwargs-only", seeded(KwargsOnly), rows, _by_keyword),
    Entry("checkpoint", seeded(lambda: Checkpointed(use_reentrant=False)), rows, mean_square),
    Entry("checkpoint-reentrant", seeded(lambda: Checkpointed(use_reentrant=True)), rows, mean_square),
    Entry("custom-function", seeded(CustomFunction), rows, mean_square),
    Entry("complex-fft", seeded(Fourier), rows, mean_square),
    Entry("mixture-of-experts", seeded(Experts), rows, mean_square),
    Entry("called-twice", seeded(CalledTwice), rows, mean_square),
    Entry("parameter-as-input", seeded(GivesItsParameter), rows, mean_square),
    Entry("spectral-norm", seeded(spectral), rows, mean_square),
    Entry("weight-norm", seeded(weight_normed), rows, mean_square),
    Entry("stale-view-as-input", seeded(Views), rows, mean_square, sgd),
    Entry("stale-view-as-output", seeded(StaleView), rows, mean_square),
    Entry("graph", seeded(Graph), graph, mean_square),
    Entry("python-and-numpy-random", seeded(OtherGenerators), rows, mean_square),
    Entry("sort-topk-quantile", seeded(Ranks), rows, mean_square),
    Entry("float64", seeded(wide), lambda seed: rows(seed).double(), mean_square),
    Entry("running-best", seeded(RunningBest), rows, _lowest_kept),
    Entry("custom-op", seeded(CustomOp), rows, mean_square),
    Entry("lazy-layers", seeded(lazy), rows, mean_square),
    Entry("detector", _DETECTOR.build, windows, _DETECTOR.loss, _DETECTOR.optimizer),
)
