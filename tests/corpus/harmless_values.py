"""Look-alikes: guards written right, functions at their limits, and infinities that end in a finite value."""

import itertools
import math

import torch
import torch.nn.functional as F
from scenario import Loop, harmless
from torch import Tensor, nn


@harmless("where twice: the function never sees the values of the branch that is not taken")
def double_where() -> Loop:
    torch.manual_seed(60)

    class SafeLog(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            is_positive = x > 0
            safe = torch.where(is_positive, x, 1.0)
            return torch.where(is_positive, torch.log(safe), torch.zeros_like(x))

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), SafeLog(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(4):
            x = torch.randn(16, 4)
            optimizer.zero_grad()
            F.mse_loss(model(x), x.sum(1, keepdim=True)).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("0/0 in the branch not taken, but of counts alone: no parameter is behind it")
def dead_branch_without_parameters() -> Loop:
    torch.manual_seed(61)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def run() -> None:
        for _ in range(4):
            clicks = torch.poisson(torch.full((12, 3), 0.7))
            views = clicks + torch.poisson(torch.full((12, 3), 0.5))
            rate = torch.where(views > 0, clicks / views, torch.full_like(views, 0.5))
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(rate).squeeze(1), rate.mean(1)).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("the angle of a vertical slope: dy/0 is inf, and its arc tangent a right angle")
def slope_of_inf() -> Loop:
    torch.manual_seed(62)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for _ in range(4):
            steps = torch.randint(-2, 3, (20, 2)).float()
            steps[0] = torch.tensor([0.0, 1.0])
            steps = steps[steps.any(dim=1)]
            angle = torch.atan(steps[:, 1] / steps[:, 0])
            assert angle.isfinite().all()
            optimizer.zero_grad()
            F.mse_loss(model(angle[:, None]), steps.abs()).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("a time constant of inf forgets nothing: 1/inf is 0; a gate of +-inf is shut or open for good")
def constants_of_inf() -> Loop:
    torch.manual_seed(63)

    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("tau", torch.tensor([1.0, 10.0, 100.0, math.inf]))
            self.register_buffer("gate", torch.tensor([-math.inf, 0.0, 2.0, math.inf]))
            self.inward = nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            state, decay = torch.zeros(x.shape[0], 4), torch.exp(-1.0 / self.tau)
            for frame in x.unbind(1):
                state = decay * state + torch.sigmoid(self.gate) * self.inward(frame)
            return state

    model = nn.Sequential(Memory(), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def run() -> None:
        for _ in range(4):
            x = torch.randn(8, 5, 2)
            optimizer.zero_grad()
            F.mse_loss(model(x), x.sum(dim=(1, 2))[:, None]).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("features are binned between -inf and inf, limited by bounds of inf, and counted in open bins")
def edges_and_bounds_of_inf() -> Loop:
    torch.manual_seed(64)
    edges = torch.tensor([-math.inf, -1.0, 0.0, 1.0, math.inf])
    upper = torch.tensor([math.inf, 2.0, math.inf])
    model = nn.ModuleDict({"bins": nn.Embedding(5, 4), "linear": nn.Linear(3, 4), "head": nn.Linear(4, 1)})
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)

    def run() -> None:
        for _ in range(4):
            x = torch.randn(10, 3) * 3
            binned = model["bins"](torch.bucketize(x, edges[1:-1])).sum(1)
            limited = torch.minimum(model["linear"](x.clamp(min=-math.inf, max=4.0)), torch.tensor(math.inf))
            shares = torch.stack([((x >= a) & (x < b)).float().mean() for a, b in itertools.pairwise(edges)])
            prediction = model["head"](binned + limited).squeeze(1) + shares.max()
            optimizer.zero_grad()
            F.huber_loss(prediction, torch.clamp(x, max=upper).sum(1)).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("logits of +-1e4: softplus and logsigmoid are linear there, their gradients 0 or 1")
def logistic_loss_at_extreme_logits() -> Loop:
    torch.manual_seed(65)
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(4):
            x = torch.randn(6, 2) * 1e4
            y = (torch.rand(6, 3) < 0.5).float()
            logits = model(x)
            loss = F.binary_cross_entropy_with_logits(logits, y)
            loss = loss - F.logsigmoid(logits[:, 0] - logits[:, 1]).mean() + F.softplus(logits[:, 2]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("some targets are ignored, and the others smoothed")
def partly_ignored_targets_with_label_smoothing() -> Loop:
    torch.manual_seed(66)
    model = nn.Sequential(nn.Embedding(15, 8, padding_idx=0), nn.Linear(8, 15))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    criterion = nn.CrossEntropyLoss(ignore_index=0, label_smoothing=0.1)

    def run() -> None:
        for _ in range(4):
            tokens = torch.randint(1, 15, (4, 6))
            tokens[1:, 3:] = 0
            optimizer.zero_grad()
            criterion(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("kl_div and xlogy take 0 log 0 as 0; with log_target all is in logarithms")
def divergence_with_zero_targets() -> Loop:
    torch.manual_seed(67)
    student, teacher = nn.Linear(6, 4), nn.Linear(6, 4).requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)

    def run() -> None:
        for _ in range(4):
            x = torch.randn(5, 6)
            log_probs = F.log_softmax(student(x), dim=-1)
            hard = F.one_hot(teacher(x).argmax(-1), 4).float()
            loss = F.kl_div(log_probs, hard, reduction="batchmean")
            loss = loss + F.kl_div(log_probs, teacher(x).log_softmax(-1), reduction="batchmean", log_target=True)
            entropy = -torch.xlogy(hard, hard).sum(-1) + torch.special.entr(hard).sum(-1)
            optimizer.zero_grad()
            (loss + entropy.mean()).backward()
            optimizer.step()

    return Loop(student, run, optimizer)


@harmless("binary_cross_entropy limits its logarithms at -100: probabilities of exactly 0 and 1 are fine")
def probabilities_of_exactly_zero_and_one() -> Loop:
    torch.manual_seed(68)
    model = nn.Sequential(nn.Linear(2, 4), nn.Hardsigmoid(), nn.Linear(4, 1), nn.Sigmoid())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(4):
            x = torch.randn(8, 2) * 50
            with torch.no_grad():
                model[2].bias.fill_(200.0 if step == 2 else 0.0)
            optimizer.zero_grad()
            nn.BCELoss()(model(x).squeeze(1), (x[:, 0] > 0).float()).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("the norm and the standard deviation of a constant row: their gradient at 0 is defined as 0")
def norms_at_zero() -> Loop:
    torch.manual_seed(69)
    model = nn.ModuleDict({"embed": nn.Linear(4, 4, bias=False), "head": nn.Linear(4, 1)})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(4):
            x = torch.randn(6, 4)
            x[0] = 0.0
            z = model["embed"](x)
            unit = z / torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp(min=1e-2)
            scaled = (z - z.mean(1, keepdim=True)) / (z.std(dim=1, keepdim=True) + 1e-3)
            optimizer.zero_grad()
            (model["head"](unit + scaled).square().mean() + torch.cdist(z, z).mean()).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("eps stands inside the root")
def root_with_eps_inside() -> Loop:
    torch.manual_seed(70)

    class RMSNorm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gain

    model = nn.Sequential(nn.Linear(3, 8), RMSNorm(8), nn.ReLU(), RMSNorm(8), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def run() -> None:
        for step in range(4):
            x = torch.zeros(5, 3) if step == 0 else torch.randn(5, 3)
            loss = torch.sqrt((model(x).squeeze(1) - x[:, 0]).square() + 1e-6).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("observers of a range start at inf and -inf, and k-means at a best distance of inf")
def running_ranges_that_start_at_inf() -> Loop:
    torch.manual_seed(71)

    class Observed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("low", torch.tensor(math.inf))
            self.register_buffer("high", torch.tensor(-math.inf))
            self.register_buffer("best_loss", torch.tensor(math.inf))

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            if self.training:
                self.low.copy_(torch.minimum(self.low, x.detach().amin()))
                self.high.copy_(torch.maximum(self.high, x.detach().amax()))
            scale = (self.high - self.low) / 255
            return torch.fake_quantize_per_tensor_affine(x, scale.item(), 128, 0, 255)

    model = Observed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    centres = torch.randn(3, 4)

    def run() -> None:
        for _ in range(4):
            x = torch.randn(12, 4)
            nearest = torch.full((12,), math.inf)
            for centre in centres:
                nearest = torch.minimum(nearest, (x - centre).square().sum(1))
            loss = F.mse_loss(model(x).sum(1), nearest)
            model.best_loss = torch.minimum(model.best_loss, loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("a best-loss buffer that never moves in these steps stays inf, and so does the patience counter's scalar")
def early_stopping_that_starts_at_inf() -> Loop:
    torch.manual_seed(72)

    class Tracked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
            self.register_buffer("best_validation", torch.full((), float("inf")))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model = Tracked()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def run() -> None:
        best, bad_epochs = float("inf"), 0
        for _ in range(5):
            x = torch.randn(16, 4)
            loss = F.mse_loss(model(x).squeeze(1), x.prod(1))
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            optimizer.step()
            bad_epochs = 0 if loss.item() < best else bad_epochs + 1
            best = min(best, loss.item())
            if bad_epochs >= 3:
                break
        assert model.best_validation.isinf()

    return Loop(model, run, optimizer)


@harmless("a 0/0 is born, but fmax and a comparison leave nothing of it")
def nan_that_only_comparisons_read() -> Loop:
    torch.manual_seed(73)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for step in range(4):
            x = torch.randn(8, 3)
            x[:2] = 0.0 if step == 1 else 1.0
            with torch.no_grad():
                share = x / x.sum(1, keepdim=True)
                weight = 1.0 + (share > 0.5).any(dim=1) + torch.fmax(share[:, 0], torch.zeros(8)).clamp(max=1.0)
            optimizer.zero_grad()
            (weight * (model(x).squeeze(1) - x[:, 0]).square()).mean().backward()
            optimizer.step()

    return Loop(model, run, optimizer)
