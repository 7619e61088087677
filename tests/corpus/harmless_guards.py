"""Look-alikes: loops that deal with it themselves: they drop the step, mend a gradient on its way, or try again."""

import math

import torch
import torch.nn.functional as F
from scenario import Loop, harmless
from torch import Tensor, nn


def assert_finite(model: nn.Module) -> None:
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


@harmless("a kernel matrix that cholesky refuses gets more jitter, until it is accepted")
def refused_matrix_tried_again_with_jitter() -> Loop:
    class Prior(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kernel = torch.exp(-(x[:, None] - x[None]).square().sum(-1) / 2)
            for jitter in (0.0, 1e-4, 1e-2):
                try:
                    return torch.linalg.cholesky(kernel + jitter * torch.eye(len(x)))
                except torch.linalg.LinAlgError:
                    continue
            raise ValueError("no jitter is enough")

    torch.manual_seed(200)
    model = nn.Sequential(nn.Linear(2, 6, bias=False), Prior())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def run() -> None:
        for step in range(3):
            x = 3 * torch.randn(5, 2)
            if step == 1:
                x[3] = x[0]
            loss = -model(x).diagonal().log().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_finite(model)

    return Loop(model, run, optimizer)


@harmless("two networks in a ModuleDict; a step is only taken where the clipped norm is finite")
def step_taken_only_where_the_norm_is_finite() -> Loop:
    torch.manual_seed(201)
    nets = nn.ModuleDict({"generator": nn.Linear(4, 4), "critic": nn.Linear(4, 1, bias=False)})
    optimizer = torch.optim.Adam(nets.parameters(), lr=1e-3)

    def run() -> None:
        num_steps = 0
        for gain in (1.0, 1.0, 0.0, 1.0, 1.0):
            optimizer.zero_grad()
            fake = nets["generator"](torch.randn(6, 4)) * gain
            nets["critic"](fake).square().sqrt().mean().backward()
            if nn.utils.clip_grad_norm_(nets.parameters(), 1.0).isfinite():
                optimizer.step()
                num_steps += 1
        assert num_steps == 4
        assert_finite(nets)

    return Loop(nets, run, optimizer)


@harmless("NaN gradients are seen, set to None, and the batch is passed over")
def batch_passed_over_for_its_gradients() -> Loop:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 2, bias=False)

    torch.manual_seed(202)
    model = Holder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(5):
            x = torch.randn(6, 4)
            if step == 2:
                x[1] = 0.0
            optimizer.zero_grad()
            model.net(x).square().sum(1).sqrt().mean().backward()
            if not all(bool(p.grad.isfinite().all()) for p in model.parameters()):
                optimizer.zero_grad()
                continue
            optimizer.step()
        assert_finite(model)

    return Loop(model, run, optimizer)


@harmless("an infinite loss is recognised by its number and the batch is passed over")
def batch_passed_over_for_the_number_of_its_loss() -> Loop:
    torch.manual_seed(203)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        for gain in (1.0, 1.0, 0.0, 1.0):
            loss = (model(torch.randn(6, 4)).square() * gain).mean().log()
            if abs(loss.item()) == math.inf:
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_finite(model)

    return Loop(model, run, optimizer)


@harmless("a hook mends the gradient of the hidden layer, where a root at 0 has made it NaN")
def gradient_mended_by_a_hook() -> Loop:
    torch.manual_seed(205)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        for _ in range(4):
            hidden = model(torch.randn(6, 4))
            hidden.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))
            loss = torch.where(hidden > 0, hidden.relu().sqrt(), 0.0).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_finite(model)

    return Loop(model, run, optimizer)


@harmless("the square of a gradient of 1e25 overflows in the norm only: clipping scales the finite gradient by 0")
def norm_of_large_gradients_overflows_in_clipping() -> Loop:
    torch.manual_seed(206)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        for gain in (1.0, 1e25, 1.0):
            loss = model(torch.randn(6, 4)).square().mean() * gain
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert_finite(model)

    return Loop(model, run, optimizer)


@harmless("ReLU's own gradient is 0 where the log and the hypotenuse behind it have none")
def gradient_stopped_by_relu() -> Loop:
    torch.manual_seed(207)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(3):
            hidden = model(torch.randn(6, 4)).relu()
            loss = torch.where(hidden > 0, hidden.log(), 0.0).mean() + torch.hypot(hidden, hidden).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_finite(model)

    return Loop(model, run, optimizer)


@harmless("masked_fill's own gradient is 0 where logsumexp of a wholly masked row has none")
def gradient_stopped_by_the_mask() -> Loop:
    torch.manual_seed(208)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    absent = torch.zeros(6, 4, dtype=torch.bool)
    absent[2] = True

    def run() -> None:
        for _ in range(3):
            scores = model(torch.randn(6, 4)).masked_fill(absent, -torch.inf)
            loss = torch.where(absent.all(1), 0.0, F.softplus(scores.logsumexp(1))).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_finite(model)

    return Loop(model, run, optimizer)
