"""Loops whose fault hides: behind a clamp, rows sliced away, a GradScaler, a thread, a state that is carried on."""

import threading

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

DIV = ("aten::div", "aten::div_")


@fault(
    "PPO (Schulman 2017): exp overflows, clamp hides it, 0 * inf", phase="forward", op=("aten::exp",), module="", step=2
)
def probability_ratio_clamped_after_it_overflowed() -> Loop:
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)

    def run() -> None:
        for gap in (0.0, 0.1, 200.0, 0.0):
            log_probability = policy(torch.randn(6, 4)).squeeze(1)
            ratio = (log_probability - (log_probability.detach() - gap)).exp()  # here
            loss = -(ratio.clamp(0.8, 1.2) * torch.randn(6)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(policy, run, optimizer)


@fault("NaN rows are sliced away; a log of dead features stays", phase="forward", op=("aten::log",), module="", step=1)
def rows_sliced_away_before_another_fault() -> Loop:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Softplus())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        for step in range(3):
            x = torch.randn(6, 4)
            x[0] = 0.0
            x = (x / x.norm(dim=1, keepdim=True))[1:]
            kept = 0.0 if step == 1 else 1.0
            loss = -(model(x) * kept).log().mean()  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("a scale of 1 explains no NaN; every step from here on is skipped", phase="backward", op=DIV, module="", step=2)
def scaler_at_a_scale_of_one() -> Loop:
    torch.manual_seed(2)
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)

    def run() -> None:
        for step in range(6):
            x = torch.randn(5, 4)
            if step >= 2:
                x[0] = 0.0
            loss = model(x).pow(2).sqrt().mean()  # here
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return Loop(model, run, optimizer)


@fault("the scaler settles, and then a root of 0 in every step", phase="backward", op=DIV, module="length")
def root_of_zero_after_the_scale_has_settled() -> Loop:
    class Length(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().sum(1).sqrt()  # here

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.length = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2, bias=False)), Length()

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return self.length(self.body(x).float() * gate)

    torch.manual_seed(3)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)

    def run() -> None:
        for step in range(20):
            gate = torch.ones(4, 1)
            if step >= 16:
                gate[0] = 0.0
            with torch.autocast("cpu", torch.float16):
                loss = (model(torch.randn(4, 8), gate) - 1).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return Loop(model, run, optimizer)


@fault("0/0 in a thread that prepares the batch", phase="data", has_line=False, step=2)
def batch_prepared_by_a_thread() -> Loop:
    class Prefetcher:
        def __init__(self, batches: list[Tensor]) -> None:
            self.batches, self.ready = batches, {}

        def prepare(self, number: int) -> None:
            batch = self.batches[number]
            self.ready[number] = batch / batch.norm(dim=1, keepdim=True)

        def get(self, number: int) -> Tensor:
            thread = threading.Thread(target=self.prepare, args=(number,))
            thread.start()
            thread.join()
            return self.ready.pop(number)

    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [torch.randn(6, 4) for _ in range(4)]
    batches[2][3] = 0.0

    def run() -> None:
        prefetcher = Prefetcher(batches)
        for number in range(4):
            loss = model(prefetcher.get(number)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("a hidden state scaled by its range, which is 0", phase="forward", op=DIV, module="", step=1)
def hidden_state_spoilt_after_the_loss_was_taken() -> Loop:
    torch.manual_seed(5)
    model = nn.GRUCell(3, 4)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)

    def run() -> None:
        state = torch.zeros(2, 4)
        for step in range(4):
            hidden = model(torch.randn(2, 3), state)
            loss = (hidden - 0.5).square().mean()
            span = hidden.detach() * (0.0 if step == 1 else 1.0)
            state = span / span.abs().amax(1, keepdim=True)  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("anomaly mode raises for the node of the root", phase="backward", op=DIV, module="", step=2)
def root_of_zero_under_anomaly_mode() -> Loop:
    torch.manual_seed(6)
    model = nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        with torch.autograd.detect_anomaly(check_nan=True):
            for step in range(4):
                x = torch.randn(5, 4)
                if step == 2:
                    x[1] = 0.0
                length = model(x).square().sum(1).sqrt()  # here
                loss = (length - 1).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return Loop(model, run, optimizer, raises=RuntimeError)


@fault("members trained under vmap; the log of a dead member", phase="forward", op=("aten::log",), module="", step=1)
def ensemble_trained_under_vmap() -> Loop:
    torch.manual_seed(7)
    members = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
    optimizer = torch.optim.SGD(members.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(3):
            x = torch.rand(5, 4)
            if step == 1:
                nn.init.constant_(members[1].bias, -200.0)
            weights, _ = stack_module_state(list(members))

            def rate(weights: dict[str, Tensor], x: Tensor = x) -> Tensor:
                return torch.log(F.softplus(functional_call(members[0], weights, (x,))))  # here

            vmap(rate)(weights).mean().backward()
            for number, member in enumerate(members):
                for parameter, stacked in zip(member.parameters(), weights.values(), strict=True):
                    parameter.grad = stacked.grad[number]
            optimizer.step()

    return Loop(members, run, optimizer)


@fault("-inf of a forbidden action times 0 of the one-hot", phase="forward", op=("aten::mul",), module="", step=2)
def masked_log_probability_times_one_hot() -> Loop:
    torch.manual_seed(8)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(4):
            forbidden = torch.tensor([False, False, step == 2])
            logits = model(torch.randn(6, 4)).masked_fill(forbidden, -torch.inf)
            chosen = F.one_hot(torch.randint(2, (6,)), 3)
            loss = -(logits.log_softmax(-1) * chosen).sum(-1).mean()  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "gradients of 65504 and more added up in half",
    phase="backward",
    op=("aten::add_", "aten::add"),
    micro_step=1,
    has_line=False,
)
def half_gradients_overflow_as_they_accumulate() -> Loop:
    torch.manual_seed(9)
    model = nn.Linear(4, 1, bias=False).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def run() -> None:
        optimizer.zero_grad()
        for _ in range(3):
            (model(torch.ones(1, 4, dtype=torch.half)).float().sum() * 40000.0).backward()
        optimizer.step()

    return Loop(model, run, optimizer)


@fault("a gradient counts as backward leaves it, mended or not", phase="backward", op=DIV, module="", step=1)
def gradients_mended_in_place_before_the_step() -> Loop:
    torch.manual_seed(10)
    model = nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(4):
            x = torch.randn(6, 4)
            if step == 1:
                x[0] = 0.0
            loss = model(x).square().sum(1).sqrt().mean()  # here
            optimizer.zero_grad()
            loss.backward()
            for parameter in model.parameters():
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
            optimizer.step()

    return Loop(model, run, optimizer)
