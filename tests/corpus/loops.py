"""Loops that end early or outside the ordinary: by their own assertions, by a library's error, without an optimizer."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn

DIV = ("aten::div", "aten::div_")


@fault("log of a probability that rounds to 0", phase="forward", op=("aten::log",), module="criterion", step=3)
def loop_that_asserts_a_finite_loss() -> Loop:
    class FocalLoss(nn.Module):
        def forward(self, logits: Tensor, label: Tensor) -> Tensor:
            probability = torch.sigmoid(logits)
            correct = torch.where(label > 0.5, probability, 1 - probability)
            return -((1 - correct) ** 2 * torch.log(correct)).mean()  # here

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))
            self.criterion = FocalLoss()

        def forward(self, x: Tensor, label: Tensor) -> dict[str, Tensor]:
            logits = self.net(x).squeeze(1)
            return {"logits": logits, "loss": self.criterion(logits, label)}

    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(6):
            x = torch.randn(12, 5) * (1e4 if step == 3 else 1)
            loss = model(x, torch.arange(12) % 2.0)["loss"]
            if not torch.isfinite(loss):
                raise ValueError(f"loss is {loss.item()} at step {step}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer, raises=ValueError)


@fault("mean over an empty mask is 0/0", phase="forward", op=("aten::div",), step=2)
def loop_that_breaks_out_on_a_nan_loss() -> Loop:
    torch.manual_seed(1)
    model = nn.GRU(4, 4, batch_first=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    class MaskedMean(nn.Module):
        def forward(self, values: Tensor, mask: Tensor) -> Tensor:
            return (values * mask).sum() / mask.sum()  # here

    criterion = MaskedMean()

    def run() -> list[float]:
        history: list[float] = []
        for length in (5, 3, 0, 4):
            x = torch.randn(2, 6, 4)
            mask = (torch.arange(6) < length).float()[None, :, None]
            prediction, _ = model(x[:, :-1])
            loss = criterion((prediction - x[:, 1:]) ** 2, mask[:, :-1].expand_as(prediction))
            history.append(loss.item())
            if math.isnan(history[-1]):
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return history

    return Loop(model, run, optimizer)


@fault("0/0 in a correlation matrix, two lines before eigh fails", phase="forward", op=DIV, module="graph", step=2)
def decomposition_that_fails_on_an_earlier_nan() -> Loop:
    class SpectralGraph(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            centred = x - x.mean(-1, keepdim=True)
            covariance = centred @ centred.mT
            spread = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
            correlation = covariance / (spread[..., :, None] * spread[..., None, :])  # here
            laplacian = torch.diag_embed(correlation.abs().sum(-1)) - correlation
            return torch.linalg.eigh(laplacian.detach()).eigenvectors

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = SpectralGraph()
            self.head = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.graph(x)).mean((1, 2))

    torch.manual_seed(2)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        for step in range(4):
            x = torch.randn(3, 4, 20)
            if step == 2:
                x[1, 2] = 0.0
            loss = F.binary_cross_entropy_with_logits(model(x), torch.ones(3))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer, raises=torch.linalg.LinAlgError)


@fault("pytorch#46849: the clip raises, without the name", phase="backward", op=DIV, module="speed", step=2)
def clipping_that_raises_on_a_bad_norm() -> Loop:
    class Speed(nn.Module):
        def forward(self, velocity: Tensor) -> Tensor:
            return torch.sqrt((velocity**2).sum(-1))  # here

    torch.manual_seed(3)
    model = nn.Sequential()
    model.add_module("flow", nn.Linear(3, 2, bias=False))
    model.add_module("speed", Speed())
    optimizer = torch.optim.RAdam(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(5):
            x = torch.randn(6, 3)
            if step == 2:
                x[5] = 0.0
            loss = F.huber_loss(model(x), torch.ones(6))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()

    return Loop(model, run, optimizer, raises=RuntimeError)


@fault("exp of a log-variance overflows in one batch after another", phase="forward", op=("aten::exp",), module="")
def loop_that_gives_up_after_three_dropped_batches() -> Loop:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.log_variance = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.mean(x), self.log_variance(x)

    torch.manual_seed(4)
    model = Encoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
        return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean()  # here

    def run() -> None:
        num_dropped = 0
        for step in range(8):
            x = torch.randn(10, 3) * (1e3 if step >= 4 else 1)
            loss = divergence(*model(x))
            if not loss.isfinite():
                num_dropped += 1
                if num_dropped == 3:
                    raise FloatingPointError("three batches in a row without a finite loss")
                continue
            num_dropped = 0
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer, raises=FloatingPointError)


@fault("a parameter's hook raises in the middle of backward", phase="backward", op=DIV, module="angle", step=1)
def gradient_hook_that_raises_on_nan() -> Loop:
    class Angle(nn.Module):
        def forward(self, pairs: Tensor) -> Tensor:
            a, b = pairs.chunk(2, dim=-1)
            product = (a.square().sum(-1) * b.square().sum(-1)).sqrt()  # here
            return (a * b).sum(-1) / (product + 1e-3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift = nn.Linear(4, 6, bias=False)
            self.angle = Angle()

        def forward(self, x: Tensor) -> Tensor:
            return self.angle(self.lift(x))

    torch.manual_seed(5)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def refuse(gradient: Tensor) -> None:
        if gradient.isnan().any():
            raise ArithmeticError("NaN in a gradient")

    for parameter in model.parameters():
        parameter.register_hook(refuse)

    def run() -> None:
        rows = torch.randn(4, 5, 4)
        rows[1, 3] = 0.0
        for x in rows:
            optimizer.zero_grad()
            (1 - model(x)).mean().backward()
            optimizer.step()

    return Loop(model, run, optimizer, raises=ArithmeticError)


@fault("an optimizer that the trace was not told of", phase="backward", op=("aten::pow",), module="1")
def optimizer_that_the_trace_does_not_know() -> Loop:
    class SignedRoot(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sign(x) * torch.abs(x) ** 0.4  # here

    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(3, 5, bias=False), SignedRoot(), nn.Linear(5, 1))

    def batches() -> Iterator[Tensor]:
        for step in range(5):
            x = torch.randn(4, 3)
            if step == 3:
                x[0] = 0.0
            yield x

    def run() -> None:
        optimizer = torch.optim.NAdam(model.parameters(), lr=1e-3)
        for x in batches():
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run)


@fault("a checkpoint that refuses NaN weights", phase="optimizer", op=("aten::addcdiv_",), module="", step=0)
def loop_that_refuses_to_save_nan_weights() -> Loop:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, eps=0.0)

    def save() -> dict[str, Tensor]:
        state = model.state_dict()
        if bad := [name for name, value in state.items() if not value.isfinite().all()]:
            raise RuntimeError(f"refused to save {', '.join(bad)}")
        return {name: value.clone() for name, value in state.items()}

    def run() -> None:
        for _ in range(4):
            x = torch.randn(6, 4)
            x[:, 1] = 0.0
            loss = F.cross_entropy(model(x), torch.randint(0, 2, (6,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # here
            save()

    return Loop(model, run, optimizer, raises=RuntimeError)
