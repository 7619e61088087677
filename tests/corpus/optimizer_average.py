"""Averages of weights: Lookahead, stochastic weight averaging, and a mean over no checkpoints."""

import copy

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

DIV = ("aten::div", "aten::div_")


@fault("running mean with a count that starts at 0", phase="optimizer", op=DIV, module="")
def averaged_model_whose_count_starts_at_zero() -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def running_mean(average: Tensor, weight: Tensor, num_averaged: Tensor | int) -> Tensor:
        return average + (weight - average) / (num_averaged - 1)  # here

    averaged = AveragedModel(model, avg_fn=running_mean)

    def run() -> None:
        for step in range(6):
            loss = F.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 2, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= 2:
                averaged.update_parameters(model)
        model.load_state_dict(averaged.module.state_dict())
        model.eval()
        with torch.inference_mode():
            model(torch.randn(3, 4)).argmax(1)

    return Loop(model, run, optimizer)


@fault("mean of the snapshots better than a limit, of which there are none", phase="optimizer", op=DIV, module="")
def mean_over_no_snapshots() -> Loop:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def run() -> None:
        kept = 0
        for _ in range(4):
            x = torch.randn(7, 3)
            loss = F.mse_loss(model(x), x.prod(1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss.item() < 1e-6:
                kept += 1
                for name, p in model.named_parameters():
                    totals[name] += p.detach()
        count = torch.tensor(float(kept))
        soup = {name: total / count for name, total in totals.items()}  # here
        model.load_state_dict(soup)
        model.eval()
        with torch.no_grad():
            model(torch.randn(2, 3))

    return Loop(model, run, optimizer)


@fault("Lookahead with a step towards the mean of k - 1 = 0 updates", phase="optimizer", op=DIV, module="")
def lookahead_that_averages_over_no_inner_step() -> Loop:
    torch.manual_seed(2)
    model = nn.Linear(3, 2)
    slow = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Lookahead:
        def __init__(self, every: int) -> None:
            self.every, self.seen = every, 0

        @torch.no_grad()
        def synchronise(self) -> None:
            for fast, kept in zip(model.parameters(), slow.parameters(), strict=True):
                kept.add_((fast - kept).div_(self.seen))  # here
                fast.copy_(kept)

        def step(self) -> None:
            optimizer.step()
            self.seen = (self.seen + 1) % self.every
            if self.seen == 0:
                self.synchronise()

    lookahead = Lookahead(every=3)

    def run() -> None:
        for _ in range(5):
            loss = F.cross_entropy(model(torch.randn(4, 3)), torch.randint(0, 2, (4,)))
            optimizer.zero_grad()
            loss.backward()
            lookahead.step()

    return Loop(model, run, optimizer)
