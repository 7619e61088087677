"""Finite matrices that a decomposition refuses: singular, or not positive-definite; the loop ends in its error."""

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn
from torch.linalg import LinAlgError


@fault("the same sensor listed twice", phase="forward", op=("aten::linalg_inv",), module="filter", step=2)
def kalman_gain_of_two_equal_sensors() -> Loop:
    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_noise = nn.Parameter(torch.zeros(2))

        def forward(self, observe: Tensor, measured: Tensor, is_noisy: bool) -> Tensor:
            noise = torch.diag(self.log_noise.exp()) * is_noisy
            innovation = observe @ observe.mT + noise
            return observe.mT @ torch.linalg.inv(innovation) @ measured  # here

    class Tracker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter, self.head = Filter(), nn.Linear(3, 1)

        def forward(self, observe: Tensor, measured: Tensor, is_noisy: bool) -> Tensor:
            return self.head(self.filter(observe, measured, is_noisy))

    torch.manual_seed(0)
    model = Tracker()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def run() -> None:
        for step in range(4):
            observe = torch.tensor([[1.0, 0, 1], [1, 0, 1]]) if step == 2 else torch.randn(2, 3)
            loss = model(observe, torch.randn(2), step != 2).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer, raises=LinAlgError)


@fault(
    "a kernel matrix of equal points, no jitter", phase="forward", op=("aten::linalg_cholesky",), module="prior", step=1
)
def gaussian_process_with_a_point_given_twice() -> Loop:
    class Prior(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kernel = torch.exp(-(x[:, None] - x[None]).square().sum(-1) / 2)
            return torch.linalg.cholesky(kernel)  # here

    class Process(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.prior = nn.Linear(2, 6, bias=False), Prior()

        def forward(self, x: Tensor) -> Tensor:
            return self.prior(self.lift(x))

    torch.manual_seed(1)
    model = Process()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(3):
            x = 3 * torch.randn(5, 2)
            if step == 1:
                x[3] = x[0]
            factor = model(x)
            loss = factor.diagonal().log().sum() + torch.cholesky_solve(torch.ones(5, 1), factor).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer, raises=LinAlgError)


@fault("normal equations of a constant feature", phase="forward", op=("aten::linalg_solve",), module="", step=2)
def least_squares_head_of_a_dead_feature() -> Loop:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(4):
            x = torch.rand(12, 4) if step != 2 else torch.zeros(12, 4)
            target = x.sum(1, keepdim=True)
            if step == 0:
                nn.init.uniform_(model[0].weight, 0.1, 1.0)
            features = model(x)
            weights = torch.linalg.solve(features.mT @ features, features.mT @ target)  # here
            loss = F.mse_loss(features @ weights, target + 0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer, raises=LinAlgError)


@fault("a covariance with a negative eigenvalue", phase="forward", op=("aten::linalg_cholesky",), module="", step=1)
def normal_distribution_with_an_indefinite_covariance() -> Loop:
    torch.manual_seed(3)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for correlation in (0.5, 1.5, 0.5):
            covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]])
            mean = model(torch.randn(6, 3))
            density = torch.distributions.MultivariateNormal(mean, covariance, validate_args=False)  # here
            loss = -density.log_prob(torch.randn(6, 2)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer, raises=LinAlgError)


@fault("Newton's step of a flat loss", phase="optimizer", op=("aten::linalg_solve",), module="", step=1)
def newton_step_of_a_flat_loss() -> Loop:
    torch.manual_seed(4)
    model = nn.Linear(3, 1, bias=False)

    class Newton(torch.optim.Optimizer):
        def __init__(self, params: list[Tensor]) -> None:
            super().__init__(params, {"lr": 0.5})
            self.curvature = torch.eye(3)

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                parameter -= 0.5 * torch.linalg.solve(self.curvature, parameter.grad[0])  # here

    optimizer = Newton(list(model.parameters()))

    def run() -> None:
        for gain in (1.0, 0.0, 1.0):
            x = torch.randn(8, 3) * gain
            loss = F.mse_loss(model(x), torch.ones(8, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.curvature = 2 * x.mT @ x / 8
            optimizer.step()

    return Loop(model, run, optimizer, raises=LinAlgError)
