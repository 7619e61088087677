"""Sums, losses and routing in float16 and bfloat16 that leave the range of the format."""

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn


@fault("a running sum of 4096 terms beyond 65504", phase="forward", op=("aten::cumsum",), module="mixer", step=2)
def running_sum_of_a_long_sequence_in_half() -> Loop:
    torch.manual_seed(0)

    class CausalAverage(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            position = torch.arange(1, x.size(1) + 1, dtype=x.dtype).unsqueeze(-1)
            return torch.cumsum(x, dim=1) / position  # here

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(1, 4)
            self.mixer = CausalAverage()
            self.head = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mixer(self.embed(x).relu()))

    model = Model().half()
    with torch.no_grad():
        model.embed.weight.fill_(2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def run() -> None:
        for length in (64, 256, 4096):
            series = 10 + torch.rand(1, length, 1).half()
            loss = F.l1_loss(model(series), series / 10)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("a sum of squared errors beyond 65504", phase="forward", op=("aten::sum",), module="", step=1)
def summed_squared_error_in_half() -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16)).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def run() -> None:
        for amplitude in (1.0, 30.0, 30.0):
            clean = amplitude * torch.randn(64, 16).half()
            noisy = clean + 0.1 * torch.randn_like(clean)
            loss = (model(noisy) - clean).square().sum()  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("focal loss: clamp(p, 1e-8) is 0 in float16", phase="forward", op=("aten::log",), module="", step=2)
def focal_loss_in_half_whose_clamp_vanishes() -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def focal_loss(logits: Tensor, targets: Tensor, gamma: float = 2.0) -> Tensor:
        p = torch.sigmoid(logits).clamp(1e-8, 1 - 1e-8)
        p_true = torch.where(targets > 0.5, p, 1 - p)
        log_p = p_true.log()  # here
        return -((1 - p_true) ** gamma * log_p).mean()

    def run() -> None:
        for step in range(4):
            x, y = torch.randn(12, 6).half(), torch.randint(0, 2, (12, 1)).half()
            logits = model(x) * (1 if step != 2 else 2000)
            loss = focal_loss(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("log(-log(u)) where u rounds to 1 in bfloat16", phase="forward", op=("aten::log",), module="", step=2)
def gumbel_noise_in_bfloat16() -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    draws = [torch.rand(16, 4) * 0.8 + 0.1 for _ in range(4)]
    draws[2][3, 1] = 0.9995

    def run() -> None:
        for uniform in draws:
            x = torch.randn(16, 6).bfloat16()
            u = uniform.bfloat16()
            noise = -torch.log(-torch.log(u))  # here
            sample = ((model(x) + noise) / 0.5).softmax(-1)
            loss = (sample * torch.arange(4)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("exp of 12 overflows float16 in a softmax by hand", phase="forward", op=("aten::exp",), module="router", step=2)
def router_with_a_softmax_by_hand_in_half() -> Loop:
    torch.manual_seed(0)

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(8, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.project(x).exp()  # here
            return scores / scores.sum(-1, keepdim=True)

    model = nn.ModuleDict({"router": Router(), "experts": nn.ModuleList(nn.Linear(8, 3) for _ in range(4))}).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        for amplitude in (1.0, 2.0, 400.0):
            x = amplitude * torch.randn(10, 8).half()
            gates = model["router"](x)
            mixed = sum(gates[:, i, None] * torch.tanh(expert(x)) for i, expert in enumerate(model["experts"]))
            loss = F.cross_entropy(mixed, torch.randint(0, 3, (10,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("a GradScaler cannot mend a forward pass", phase="forward", op=("aten::addmm",), module="2", step=2)
def loss_scale_that_falls_because_the_forward_overflows() -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    with torch.no_grad():
        model[0].weight.abs_()
        model[2].weight.abs_().mul_(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def run() -> None:
        for amplitude in (1.0, 10.0, 2e4, 2e4, 2e4):
            x, y = amplitude * torch.rand(8, 6), torch.randint(0, 2, (8,))
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x), y)  # here
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return Loop(model, run, optimizer)
