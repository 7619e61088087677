"""Weights changed after ``optimizer.step``, averages, targets, and updates by hand without any optimizer."""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn

DIV = ("aten::div", "aten::div_")


@fault("weights rebound to weight / norm, the norm of a masked layer", phase="optimizer", op=DIV, module="", step=1)
def weight_rebound_to_its_direction() -> Loop:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.direction, self.offset = nn.Linear(4, 1, bias=False), nn.Linear(4, 1)

    torch.manual_seed(0)
    model = Probe()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def run() -> None:
        for kept in (1.0, 0.0, 1.0):
            x = torch.randn(6, 4)
            loss = F.mse_loss(model.direction(x) + model.offset(x), torch.ones(6, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            masked = model.direction.weight.data * kept
            model.direction.weight.data = masked / masked.norm()  # here

    return Loop(model, run, optimizer)


@fault("rows of a codebook scaled to length 1 in place", phase="optimizer", op=DIV, module="", step=2)
def codebook_row_of_no_length_after_the_step() -> Loop:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5, bias=False))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)

    def run() -> None:
        for step in range(4):
            loss = F.cross_entropy(model(torch.randn(8, 3)), torch.randint(5, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                if step == 2:
                    model[2].weight[4] = 0.0
                model[2].weight.div_(model[2].weight.norm(dim=1, keepdim=True))  # here

    return Loop(model, run, optimizer)


@fault("a decay table with a NaN, in lerp_", phase="optimizer", op=("aten::lerp_",), module="", step=2)
def average_with_a_decay_that_is_nan() -> Loop:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.register_buffer("average", self.head.weight.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    torch.manual_seed(2)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    decays = (0.5, 0.9, math.nan, 0.99)

    def run() -> None:
        for decay in decays:
            loss = model(torch.randn(7, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.average.lerp_(model.head.weight.detach(), 1 - decay)  # here

    return Loop(model, run, optimizer)


@fault("Polyak averaging with a rate of inf", phase="optimizer", op=("aten::mul_",), module="", step=1)
def target_network_with_an_infinite_rate() -> Loop:
    class Learner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
            self.target = copy.deepcopy(self.online).requires_grad_(False)

        @torch.no_grad()
        def follow(self, rate: float) -> None:
            for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=True):
                slow.mul_(1 - rate).add_(fast, alpha=0.005)  # here

    torch.manual_seed(3)
    learner = Learner()
    optimizer = torch.optim.Adam(learner.online.parameters(), lr=1e-3)

    def run() -> None:
        for rate in (0.005, math.inf, 0.005):
            state, reward, following = torch.randn(8, 3), torch.randn(8), torch.randn(8, 3)
            with torch.no_grad():
                wanted = reward + 0.99 * learner.target(following).amax(1)
            loss = F.smooth_l1_loss(learner.online(state).amax(1), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            learner.follow(rate)

    return Loop(learner, run, optimizer)


@fault("weights multiplied by 1/0 of numpy", phase="optimizer", op=("aten::mul_",), module="", step=2)
def shrinkage_factor_that_numpy_divided_by_zero() -> Loop:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    def run() -> None:
        spread = np.array([1.0, 2.0, 0.0, 1.0])
        with np.errstate(divide="ignore"):
            factors = 1 / spread
        for factor in factors:
            x = torch.randn(6, 4)
            loss = F.mse_loss(model(x), x.sum(1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model[2].weight.mul_(float(factor))  # here

    return Loop(model, run, optimizer)


@fault("beta1 from a schedule with 0/0", phase="optimizer", op=("aten::_foreach_lerp_",), module="", step=2)
def adam_whose_beta_becomes_nan() -> Loop:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=True)

    def run() -> None:
        for beta in (0.85, 0.9, math.nan, 0.9):
            for group in optimizer.param_groups:
                group["betas"] = (beta, 0.999)
            loss = model(torch.randn(5, 3)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # here

    return Loop(model, run, optimizer)


@fault("autograd.grad and an update by hand; root of 0", phase="backward", op=DIV, module="", step=2)
def gradient_asked_for_and_subtracted_by_hand() -> Loop:
    torch.manual_seed(7)
    model = nn.Linear(4, 2, bias=False)

    def run() -> None:
        for step in range(4):
            x = torch.randn(6, 4)
            if step == 2:
                x[5] = 0.0
            loss = torch.sqrt(model(x).pow(2).sum(1)).mean()  # here
            weights = list(model.parameters())
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight -= 0.1 * gradient

    return Loop(model, run)


@fault("zero_grad() of the model after its forward, no optimizer", phase="backward", op=DIV, module="", step=2)
def part_of_a_model_trained_without_an_optimizer() -> Loop:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 1, bias=False)

    torch.manual_seed(9)
    model = Holder()

    def run() -> None:
        for step in range(4):
            x = torch.randn(5, 4)
            if step == 2:
                x[0] = 0.0
            loss = (model.net(x) ** 2).sqrt().mean()  # here
            model.zero_grad()
            loss.backward()
            for parameter in model.parameters():
                parameter.data.add_(parameter.grad, alpha=-0.1)

    return Loop(model, run)


@fault("an update by hand divides by the batches that counted", phase="optimizer", op=DIV, module="", step=1)
def update_by_hand_divided_by_no_batches() -> Loop:
    torch.manual_seed(10)
    model = nn.Linear(3, 2)

    def run() -> None:
        for counted in (4, 0, 4):
            loss = F.cross_entropy(model(torch.randn(6, 3)), torch.randint(2, (6,)))
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad / counted)  # here

    return Loop(model, run)
