"""Finite gradients that torch's own optimizers turn into non-finite weights or state."""

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn

ADDCDIV = ("aten::addcdiv_", "aten::addcdiv")
ADDCMUL = ("aten::addcmul_", "aten::addcmul")
ADD = ("aten::add_", "aten::add", "aten::sub_")
MISSING = 9.96921e36


def tagger(**options: bool) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(20, 6, **options), nn.Flatten(), nn.Linear(24, 3))


@fault("pytorch#147437: eps=1e-8 is 0 in float16", phase="optimizer", op=ADDCDIV, module="", step=0)
def half_adam_on_words_that_do_not_occur() -> Loop:
    torch.manual_seed(0)
    model = tagger().half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=False)

    def run() -> None:
        for _ in range(3):
            words, label = torch.randint(0, 10, (8, 4)), torch.randint(0, 3, (8,))
            loss = F.cross_entropy(model(words), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # here

    return Loop(model, run, optimizer)


@fault("the same through the foreach kernels", phase="optimizer", op=("aten::_foreach_addcdiv_",), module="", step=0)
def half_adam_with_foreach_kernels() -> Loop:
    torch.manual_seed(1)
    model = nn.ModuleDict({"words": nn.Embedding(30, 4), "classify": nn.Linear(4, 2)}).half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=True)

    def train_one(words: Tensor, label: Tensor) -> float:
        logits = model["classify"](model["words"](words).mean(1)).float()
        loss = nn.functional.cross_entropy(logits, label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()  # here
        return loss.item()

    def run() -> None:
        for _ in range(3):
            train_one(torch.randint(5, 15, (6, 7)), torch.randint(0, 2, (6,)))

    return Loop(model, run, optimizer)


@fault("a NetCDF fill value squared (numerics E4: 1e21)", phase="optimizer", op=ADDCMUL, module="", step=3)
def adam_second_moment_overflows_on_a_fill_value() -> Loop:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = torch.randn(6, 16, 4)
    batches[3, 5, 2] = MISSING

    def run() -> None:
        for rows in batches:
            loss = F.l1_loss(model(rows), torch.zeros(16, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # here

    return Loop(model, run, optimizer)


@fault("exp(60) as a gradient, squared", phase="optimizer", op=("aten::_foreach_addcmul_",), module="", step=2)
def amsgrad_second_moment_overflows_on_a_large_rate() -> Loop:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_rate = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x: Tensor, exposure: Tensor) -> Tensor:
            return self.log_rate(x) + exposure

    torch.manual_seed(3)
    model = Counts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True, foreach=True)

    def run() -> None:
        for step in range(4):
            exposure = torch.zeros(10, 1)
            if step == 2:
                exposure[4] = 60.0
            loss = F.poisson_nll_loss(model(torch.randn(10, 3), exposure), torch.ones(10, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # here

    return Loop(model, run, optimizer)


@fault(
    "the fused kernel squares the gradient as well", phase="optimizer", op=("aten::_fused_adamw_",), module="", step=2
)
def fused_adamw_second_moment_overflows() -> Loop:
    torch.manual_seed(4)
    model = nn.Linear(5, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    rows = torch.randn(4, 8, 5)
    rows[2, 0, 0] = 1e22

    def run() -> None:
        for x in rows:
            optimizer.zero_grad()
            model(x).abs().mean().backward()
            optimizer.step()  # here

    return Loop(model, run, optimizer)


@fault("a momentum of 0.99 sums gradients of 2e4 past 65504", phase="optimizer", op=ADD, module="", step=3)
def half_momentum_buffer_overflows() -> Loop:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.99)

    def run() -> None:
        for _ in range(5):
            x = torch.full((4, 2), 5000.0).half()
            loss = model(x).float().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # here

    return Loop(model, run, optimizer)


@fault("a table of rates with an inf for one group", phase="optimizer", op=ADD, module="", step=2)
def schedule_with_an_infinite_rate_for_one_group() -> Loop:
    torch.manual_seed(6)
    model = nn.ModuleDict({"body": nn.Linear(4, 6), "head": nn.Linear(6, 2)})
    groups = [{"params": model["body"].parameters(), "lr": 1e-3}, {"params": model["head"].parameters(), "lr": 1e-2}]
    optimizer = torch.optim.SGD(groups)
    plan = [float(cell) for cell in ("1.0", "0.5", "inf", "0.1", "0.1")]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda epoch: 1.0, lambda epoch: plan[epoch]])

    def run() -> None:
        for _ in range(4):
            loss = F.cross_entropy(model["head"](model["body"](torch.randn(6, 4)).relu()), torch.randint(0, 2, (6,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # here
            schedule.step()

    return Loop(model, run, optimizer)


@fault("a table of rates with a gap that was exported as nan", phase="optimizer", op=("aten::mul_",), module="", step=2)
def schedule_with_a_gap_in_its_table() -> Loop:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    rates = {row.split(":")[0]: float(row.split(":")[1]) for row in ("0: 0.5", "1: 1.0", "2: nan", "3: 0.2", "4: 0.1")}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: rates[str(epoch)])

    def run() -> None:
        for _ in range(4):
            loss = model(torch.randn(5, 3)).square().mean()
            loss.backward()
            optimizer.step()  # here
            optimizer.zero_grad()
            schedule.step()

    return Loop(model, run, optimizer)


@fault("g / sqrt(sum of squares) is 0/0 without eps", phase="optimizer", op=ADDCDIV, module="", step=0)
def adagrad_without_eps_on_unseen_words() -> Loop:
    torch.manual_seed(8)
    model = tagger()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, eps=0.0)

    def run() -> None:
        for low in (0, 5, 10):
            words = torch.randint(low, low + 5, (8, 4))
            loss = F.cross_entropy(model(words), torch.randint(0, 3, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # here

    return Loop(model, run, optimizer)


@fault("sqrt(0) / sqrt(0) without eps", phase="optimizer", op=("aten::div_", "aten::div"), module="", step=0)
def adadelta_without_eps_on_a_frozen_input() -> Loop:
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 1))
    optimizer = torch.optim.Adadelta(model.parameters(), eps=0.0)

    def run() -> None:
        for _ in range(3):
            x = torch.randn(6, 4)
            x[:, 2] = 0.0
            loss = F.mse_loss(model(x), x.sum(1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # here

    return Loop(model, run, optimizer)


@fault("E[g^2] - E[g]^2 < 0 by rounding for a steady gradient", phase="optimizer", op=("aten::sqrt_",), module="")
def centred_rmsprop_on_a_steady_gradient() -> Loop:
    torch.manual_seed(10)
    model = nn.Linear(50, 1, bias=False)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-4, alpha=0.9, centered=True)
    x = torch.randn(1, 50)

    def run() -> None:
        for _ in range(400):
            optimizer.zero_grad()
            model(x).mean().backward()
            optimizer.step()  # here

    return Loop(model, run, optimizer)


@fault("y * s of a fit in particles per cubic metre is 4e38", phase="optimizer", op=("aten::dot",), module="", step=0)
def lbfgs_curvature_in_large_units_overflows() -> Loop:
    class Plasma(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.density = nn.Parameter(torch.zeros(1))

        def forward(self, measured: float) -> Tensor:
            return 2 * (self.density - measured).square().sum()

    model = Plasma()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e19, max_iter=5)

    def run() -> None:
        for measured in (6e18, 6.1e18):

            def closure(measured: float = measured) -> Tensor:
                optimizer.zero_grad()
                loss = model(measured)
                loss.backward()
                return loss

            optimizer.step(closure)  # here

    return Loop(model, run, optimizer)


@fault("momentum that was saved after the crash", phase="optimizer", module="", step=0, tensor="momentum_buffer")
def resumed_momentum_that_is_not_finite() -> Loop:
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    saved = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(3, 4)).mean().backward()
    saved.step()
    checkpoint = saved.state_dict()
    checkpoint["state"][2]["momentum_buffer"][0, 3] = torch.inf
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(checkpoint)

    def run() -> None:
        for _ in range(3):
            loss = F.mse_loss(model(torch.randn(5, 4)), torch.zeros(5, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # here

    return Loop(model, run, optimizer)


@fault("a range test that multiplies the rate by 1e5 up to 1e38", phase="optimizer", op=ADD, module="", step=9)
def learning_rate_range_test_without_a_stop() -> Loop:
    torch.manual_seed(12)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=1e5)
    history: list[tuple[float, float]] = []

    def run() -> None:
        for _ in range(10):
            x = 10 * torch.randn(16, 3) + 5
            loss = F.l1_loss(model(x), x.sum(1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # here
            history.append((schedule.get_last_lr()[0], loss.item()))
            schedule.step()

    return Loop(model, run, optimizer)
