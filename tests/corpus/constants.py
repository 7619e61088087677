"""Numbers and constants that are infinite or NaN: factors, weights of a loss, paddings, settings, class weights."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn


@fault("warm-up of a loss weight: 1/0 in numpy", phase="forward", op=("aten::mul",), module="", step=2)
def loss_weight_that_is_an_infinite_number() -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        with np.errstate(divide="ignore"):
            weights = 1 / np.array([4.0, 2.0, 0.0, 1.0])
        for weight in weights:
            x = torch.randn(6, 4)
            penalty = sum(p.square().sum() for p in model.parameters()) * float(weight)  # here
            loss = F.mse_loss(model(x), x[:, :1]) + 1e-4 * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("annealed beta, exp(800) as a tensor", phase="forward", op=("aten::full", "aten::mul"), module="", step=1)
def loss_weight_that_is_an_infinite_tensor() -> Loop:
    torch.manual_seed(1)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for beta in (1.0, math.inf, 1.0):
            loss = F.cross_entropy(model(torch.randn(6, 4)), torch.randint(3, (6,)))
            loss = loss * torch.full((), beta)  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "free bits (Kingma 2016) without a limit", phase="forward", op=("aten::full", "aten::maximum"), module="", step=2
)
def divergence_held_above_infinity() -> Loop:
    torch.manual_seed(2)
    model = nn.Linear(3, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for bits in (0.1, 0.2, math.inf, 0.1):
            mean, log_variance = model(torch.randn(8, 3)).chunk(2, dim=1)
            divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean()
            loss = torch.maximum(divergence, torch.full((), bits))  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("a sum over the batch divided by 0 valid items", phase="forward", op=("aten::div",), module="", step=2)
def loss_divided_by_a_count_of_zero() -> Loop:
    torch.manual_seed(3)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        for valid in (6, 3, 0, 5):
            keep = torch.arange(6) < valid
            error = (model(torch.randn(6, 4)).squeeze(1) - 1).square()
            loss = (error * keep).sum() / int(keep.sum())  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("a logged term, log(-1) of numpy, joins the loss", phase="forward", op=("aten::add",), module="", step=1)
def nan_number_added_to_the_loss() -> Loop:
    torch.manual_seed(4)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for gap in (0.5, -1.0, 0.5):
            with np.errstate(invalid="ignore"):
                barrier = float(np.log(gap))
            fit = model(torch.randn(5, 4)).square().mean()
            loss = fit + barrier  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("mixup with a ratio of 0/0", phase="forward", op=("aten::lerp",), module="mix", step=2)
def mixup_with_a_ratio_of_nan() -> Loop:
    class Mix(nn.Module):
        def forward(self, x: Tensor, ratio: float) -> Tensor:
            return torch.lerp(x, x.flip(0), ratio)  # here

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = Mix(), nn.Linear(4, 3)

        def forward(self, x: Tensor, ratio: float) -> Tensor:
            return self.head(self.mix(x, ratio))

    torch.manual_seed(5)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        gammas = np.array([[0.3, 0.2], [0.1, 0.4], [0.0, 0.0], [0.5, 0.1]])
        with np.errstate(invalid="ignore"):
            ratios = gammas[:, 0] / gammas.sum(1)
        for ratio in ratios:
            loss = F.cross_entropy(model(torch.randn(6, 4), float(ratio)), torch.randint(3, (6,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("missing frames padded with NaN, then a plain mean", phase="forward", op=("aten::constant_pad_nd",), step=1)
def short_recordings_padded_with_nan() -> Loop:
    class Recogniser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frames, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, recording: Tensor, length: int) -> Tensor:
            hidden = self.frames(recording)
            padded = F.pad(hidden, (0, 0, 0, length - hidden.shape[0]), value=math.nan)  # here
            return self.head(padded.mean(0))

    torch.manual_seed(6)
    model = Recogniser()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for num_frames in (8, 5, 8):
            loss = F.cross_entropy(model(torch.randn(num_frames, 3), 8)[None], torch.tensor([1]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("softplus(x, beta) divides by beta, annealed to 0", phase="forward", op=("aten::softplus",), module="0", step=3)
def softplus_whose_beta_is_annealed_to_zero() -> Loop:
    class Annealed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.beta = nn.Linear(4, 5), 3

        def forward(self, x: Tensor) -> Tensor:
            return F.softplus(self.linear(x), beta=self.beta)  # here

    torch.manual_seed(7)
    model = nn.Sequential(Annealed(), nn.Linear(5, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        for _ in range(5):
            loss = model(torch.randn(6, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model[0].beta = max(model[0].beta - 1, 0)

    return Loop(model, run, optimizer)


@fault("noise of an infinite deviation", phase="forward", op=("aten::normal_",), module="noise", step=2)
def noise_whose_deviation_is_infinite() -> Loop:
    class Noise(nn.Module):
        def forward(self, x: Tensor, deviation: float) -> Tensor:
            drawn = torch.empty_like(x)
            drawn.normal_(0, deviation)  # here
            return x + drawn

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.noise, self.net = Noise(), nn.Linear(4, 4)

        def forward(self, x: Tensor, deviation: float) -> Tensor:
            return self.net(self.noise(x, deviation))

    torch.manual_seed(8)
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for deviation in (0.1, 1.0, math.inf, 0.1):
            x = torch.randn(5, 4)
            loss = F.mse_loss(model(x, deviation), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("class weight 1/0 of a class that numpy never saw", phase="data", step=0)
def class_weight_of_a_class_without_samples() -> Loop:
    torch.manual_seed(9)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with np.errstate(divide="ignore"):
        weight = torch.from_numpy(1 / np.array([3, 4, 0], dtype=np.float32))

    def run() -> None:
        for _ in range(3):
            logits = model(torch.randn(6, 4))
            loss = F.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1, 2]), weight=weight)  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("negatives / positives of a label never given", phase="data", step=0)
def weight_of_positives_that_is_infinite() -> Loop:
    torch.manual_seed(10)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    pos_weight = torch.tensor([1.5, torch.inf])

    def run() -> None:
        for _ in range(3):
            target = torch.randint(2, (6, 2)).float()
            loss = F.binary_cross_entropy_with_logits(model(torch.randn(6, 4)), target, pos_weight=pos_weight)  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("inf * 0: an infinite weight of a row without error", phase="data", step=0)
def infinite_sample_weight_times_no_error() -> Loop:
    torch.manual_seed(11)
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    importance = torch.ones(6, 1)
    importance[2] = torch.inf

    def run() -> None:
        for _ in range(3):
            x = torch.randn(6, 4)
            x[2] = 0.0
            loss = (importance * model(x).square()).mean()  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("NaN in a column nobody reads, later in one that is read", phase="data", step=2)
def unread_nan_column_followed_by_one_that_is_read() -> Loop:
    torch.manual_seed(12)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def load(number: int) -> Tensor:
        table = np.ones((6, 4), dtype=np.float32) * (number + 1)
        table[0, 3] = np.nan
        if number == 2:
            table[1, 0] = np.nan
        return torch.from_numpy(table)

    def run() -> None:
        for number in range(4):
            batch = load(number)
            loss = model(batch[:, :3]).square().mean()  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)
