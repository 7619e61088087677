"""Recurrences, running products, linear algebra, spectra and diverging training in the forward pass."""

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn


@fault("a ReLU recurrence of gain 3 over 120 steps", phase="forward", op=("aten::addmm",), module="rnn", step=2)
def recurrence_with_rectifiers_explodes() -> Loop:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(3, 8, nonlinearity="relu", batch_first=True)
            self.head = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden, _ = self.rnn(x)  # here
            return self.head(hidden[:, -1])

    model = Model()
    with torch.no_grad():
        model.rnn.weight_hh_l0.copy_(3 * torch.eye(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)

    def run() -> None:
        for length in (5, 10, 120):
            output = torch.tanh(model(torch.rand(2, length, 3)))
            loss = F.mse_loss(output, torch.ones(2, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("inf - inf inside the gates of an LSTM cell", phase="forward", op=("aten::addmm",), module="cells.1")
def long_short_term_memory_with_extreme_weights() -> Loop:
    torch.manual_seed(0)

    class Forecaster(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift = nn.Linear(2, 2, bias=False)
            self.cells = nn.ModuleList([nn.LSTMCell(2, 2), nn.LSTMCell(2, 4)])
            self.head = nn.Linear(4, 2)

        def forward(self, series: Tensor) -> Tensor:
            states = [None, None]
            for frame in series:
                states[0] = self.cells[0](self.lift(frame) / 1e19, states[0])
                states[1] = self.cells[1](self.lift(frame), states[1])  # here
            return self.head(states[1][0] + states[0][0].sum(-1, keepdim=True))

    model = Forecaster()
    with torch.no_grad():
        model.lift.weight.copy_(torch.eye(2))
        model.cells[1].weight_ih[:, 0] = 1e20
        model.cells[1].weight_ih[:, 1] = -1e20
    model.eval()

    def run() -> None:
        with torch.no_grad():
            for amplitude in (1.0, 1e5, 1e19):
                model(amplitude * torch.ones(4, 1, 2))

    return Loop(model, run)


@fault("a cell by hand whose state doubles", phase="forward", op=("aten::mul",), module="cell", step=3)
def cell_by_hand_whose_state_overflows() -> Loop:
    torch.manual_seed(0)

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.candidate = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            decay = 2.0 + torch.sigmoid(self.gate(x))
            kept = decay * state  # here
            return kept + torch.tanh(self.candidate(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = Cell(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(x.size(1), 4)
            for frame in x:
                state = self.cell(frame, state)
            return self.head(state / (1 + state.abs()))

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def run() -> None:
        for length in (4, 8, 12, 140, 4):
            loss = F.cross_entropy(model(torch.randn(length, 3, 4)), torch.randint(0, 2, (3,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("a product of 400 factors above 1", phase="forward", op=("aten::cumprod",), module="", step=1)
def compounded_returns_of_a_long_horizon() -> Loop:
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1), nn.Softplus())
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)

    def run() -> None:
        for horizon in (20, 400, 20):
            market = torch.randn(3, horizon, 5)
            growth = 1 + policy(market).squeeze(-1)
            wealth = torch.cumprod(growth, dim=1)  # here
            loss = -wealth[:, -1].mean() / (1 + wealth.detach().mean())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(policy, run, optimizer)


@fault("discrete survival: the log of a product that is 0", phase="forward", op=("aten::log",), module="", step=1)
def log_of_a_survival_curve_that_underflows() -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ELU(), nn.Linear(16, 200))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for risk in (-5.0, 2.0, -5.0):
            hazards = torch.sigmoid(model(torch.randn(6, 5)) + risk)
            survival = (1 - hazards).cumprod(dim=1)
            loss = -survival[:, -1].log().mean()  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "normal equations of empty documents",
    phase="forward",
    op=("aten::_linalg_solve_ex",),
    module="readout",
    step=2,
)
def least_squares_without_a_ridge() -> Loop:
    torch.manual_seed(0)

    class Readout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(2, 2, bias=False)

        def forward(self, support: Tensor, target: Tensor, query: Tensor) -> Tensor:
            phi = self.encode(support)
            weights, _ = torch.linalg.solve_ex(phi.T @ phi, phi.T @ target)  # here
            return self.encode(query) @ weights

    model = nn.ModuleDict({"readout": Readout()})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(4):
            support = torch.randn(6, 2)
            if step == 2:
                support.zero_()
            prediction = model["readout"](support, torch.ones(6, 1), torch.randn(3, 2))
            loss = F.mse_loss(prediction, torch.zeros(3, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("an isolated node: degree 0 to the power -1/2", phase="forward", op=("aten::pow",), module="laplacian", step=2)
def eigenvectors_of_a_graph_with_an_isolated_node() -> Loop:
    torch.manual_seed(0)

    class Laplacian(nn.Module):
        def forward(self, adjacency: Tensor) -> Tensor:
            inverse_root = adjacency.sum(-1).pow(-0.5)  # here
            scaled = inverse_root[:, :, None] * adjacency * inverse_root[:, None, :]
            return torch.eye(adjacency.size(-1)) - scaled

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.laplacian, self.head = Laplacian(), nn.Linear(3, 2)

        def forward(self, adjacency: Tensor) -> Tensor:
            _, vectors = torch.linalg.eigh(self.laplacian(adjacency))
            return self.head(vectors[:, :, 1:4].abs().mean(1))

    model = Encoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(4):
            weights = torch.rand(4, 6, 6)
            adjacency = (weights + weights.mT) / 2 * (1 - torch.eye(6))
            if step == 2:
                adjacency[1, 4, :] = 0
                adjacency[1, :, 4] = 0
            loss = F.cross_entropy(model(adjacency), torch.randint(0, 2, (4,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer, raises=torch.linalg.LinAlgError)


@fault("log of the spectrum of silence", phase="forward", op=("aten::log",), module="frontend", step=1)
def log_spectrum_of_a_silent_clip() -> Loop:
    torch.manual_seed(0)

    class Frontend(nn.Module):
        def forward(self, wave: Tensor) -> Tensor:
            frames = wave.unfold(-1, 16, 8)
            power = torch.fft.rfft(frames * torch.hann_window(16)).abs().square()
            features = power.log()  # here
            return (features - features.mean(1, keepdim=True)) / (features.std(1, keepdim=True) + 1e-5)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frontend, self.classes = Frontend(), nn.Linear(9, 4)

        def forward(self, wave: Tensor) -> Tensor:
            return self.classes(self.frontend(wave).mean(1))

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for step in range(3):
            wave = torch.randn(4, 128)
            if step == 1:
                wave[2] = 0
            loss = F.cross_entropy(model(wave), torch.randint(0, 4, (4,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("the phase z / |z| of a coefficient that is 0", phase="forward", op=("aten::div",), module="whiten", step=2)
def complex_phase_of_an_empty_band() -> Loop:
    torch.manual_seed(0)

    class Whiten(nn.Module):
        def forward(self, wave: Tensor) -> Tensor:
            spectrum = torch.fft.rfft(wave, norm="ortho")
            whitened = spectrum / spectrum.abs()  # here
            return torch.fft.irfft(whitened, n=wave.size(-1), norm="ortho")

    model = nn.Sequential()
    model.add_module("filter", nn.Linear(32, 32, bias=False))
    model.add_module("whiten", Whiten())
    model.add_module("pool", nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def run() -> None:
        for step in range(4):
            wave = torch.randn(8, 32)
            wave[5] *= step != 2
            loss = F.binary_cross_entropy_with_logits(model(wave), torch.ones(8, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("SGD beyond 2 / curvature: the squared error overflows", phase="forward", op=("aten::mse_loss",), module="")
def regression_with_a_learning_rate_too_large() -> Loop:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=50.0)
    x, y = torch.randn(64, 4), torch.randn(64, 1)

    def run() -> None:
        for _ in range(30):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)  # here
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("lr of 30: 4e48 in float64 at step 6", phase="forward", op=("aten::addmm",), module="2", step=6)
def classifier_with_a_learning_rate_too_large() -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.LeakyReLU(), nn.Linear(32, 32), nn.LeakyReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=30.0)
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))

    def run() -> None:
        for _ in range(12):
            optimizer.zero_grad()
            logits = model(x)  # here
            loss = F.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)
