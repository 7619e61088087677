"""Healthy runs give no finding at all; runs that go wrong are named before anything is NaN."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanhunt.findings import Finding
from nanhunt.observe.health import HealthProbe
from nanhunt.rules.registry import judge_record

NUM_STEPS = 48


@dataclass
class Run:
    """A training run: its models, what one step computes, and what was true of each step, for the oracle."""

    models: dict[str, nn.Module]
    losses: Callable[[int], list[tuple[torch.optim.Optimizer, Tensor]]]
    scaler: Any = None
    after: Callable[[], Any] = lambda: None
    edit_gradients: Callable[[int], Any] = lambda step: None
    norms: list[float] = field(default_factory=list)

    def findings(self, num_steps: int = NUM_STEPS) -> tuple[Finding, ...]:
        modules = {
            f"{key}.{name}".strip("."): module
            for key, model in self.models.items()
            for name, module in model.named_modules()
        }
        names = {
            id(p): f"{key}.{name}".strip(".") for key, m in self.models.items() for name, p in m.named_parameters()
        }
        with HealthProbe().attach(modules) as probe:
            for step in range(num_steps):
                probe.begin_step(step)
                for optimizer, loss in self.losses(step):
                    self._step(probe, step, optimizer, loss, names)
                self.after()
            health = probe.records()
        assert health.problems == ()
        return judge_record(health).findings

    def _step(self, probe: HealthProbe, step: int, optimizer: Any, loss: Tensor, names: dict[int, str]) -> None:
        optimizer.zero_grad()
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        self.edit_gradients(step)
        hooks = (
            optimizer.register_step_pre_hook(lambda optimizer, *_: probe.before_optimizer_step(optimizer, names)),
            optimizer.register_step_post_hook(lambda optimizer, *_: probe.after_optimizer_step(optimizer, names)),
        )
        gradients = [p.grad.double() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
        if self.scaler is None:
            optimizer.step()
        else:
            before = self.scaler.get_scale()
            self.scaler.step(optimizer)
            self.scaler.update()
            probe.note_scale(self.scaler.get_scale(), self.scaler.get_scale() < before)
        for hook in hooks:
            hook.remove()


def supervised(
    model: nn.Module,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> Run:
    optimizer = make([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-3, **options})

    def losses(step: int) -> list[tuple[torch.optim.Optimizer, Tensor]]:
        x, y = batch(step)
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            out = model(x)
        return [(optimizer, loss(out.float() if autocast else out, y))]

    return Run({"": model}, losses)


def noise(*shape: int, scale: float = 1.0, classes: int = 3) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda step: (torch.randn(*shape) * scale, torch.randint(0, classes, shape[:1]))


def line(scale: float = 1.0, width: int = 8) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Inputs and a target that is a line in them."""
    direction = torch.randn(width, 1)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, width)
        return x, scale * (x @ direction + 1)

    return batch


def mlp(*widths: int, gain: float | None = None, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), act()]
        if gain is not None:
            nn.init.xavier_normal_(layers[-2].weight, gain)
            nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


class Transformer(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(16, 11)

    def forward(self, ids: Tensor) -> Tensor:
        mask = torch.full((ids.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)
        return self.head(self.encoder(self.embed(ids), mask=mask)).flatten(0, 1)


def transformer(**options: Any) -> Run:
    def batch(step: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(1, 11, (4, 9))
        ids[:, -2:] = 0
        return ids, ids.roll(-1, 1).flatten()

    return supervised(Transformer(), batch, lambda out, y: F.cross_entropy(out, y, ignore_index=0), **options)


def half(run: Run) -> Run:
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=5)
    return run


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        nn.init.zeros_(self.body[1].weight)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu_(x + self.body(x)).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], width: int = 12) -> None:
        super().__init__()
        self.rnn, self.head = kind(4, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base.in_features) * 0.02)
        self.b = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Experts(nn.Module):
    """One of sixteen small networks per row; the others get a gradient of exactly zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(8, 8), nn.Linear(8, 16)
        self.experts = nn.ModuleList(mlp(8, 8, 3) for _ in range(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        weights, choice = self.router(x).softmax(1).max(1)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return (outputs * F.one_hot(choice, 16)[..., None]).sum(1) * weights[:, None]


def warm_up() -> Run:
    model = mlp(8, 16, 3)
    run = supervised(model, noise(16, 8), F.cross_entropy)
    [(optimizer, _)] = run.losses(0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 30, 1.0))
    run.after = schedule.step
    return run


def warm_up_in_bfloat16() -> Run:
    model = mlp(8, 16, 3).bfloat16()
    run = supervised(model, lambda step: (torch.randn(16, 8).bfloat16(), torch.randint(0, 3, (16,))), F.cross_entropy)
    [(optimizer, _)] = run.losses(0)
    run.after = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 30, 1.0)).step
    return run


def gan() -> Run:
    generator, critic = mlp(4, 16, 2), mlp(2, 16, 1, act=nn.LeakyReLU)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.5, 0.9)) for m in (generator, critic)]

    def losses(step: int) -> list[tuple[torch.optim.Optimizer, Tensor]]:
        fake = generator(torch.randn(16, 4))
        loss = F.softplus(critic(fake.detach())).mean() + F.softplus(-critic(torch.randn(16, 2) + 3)).mean()
        return [(optimizers[0], F.softplus(-critic(fake)).mean()), (optimizers[1], loss)]

    return Run({"generator": generator, "critic": critic}, losses)


def dead_units() -> Run:
    model = mlp(8, 32, 32, 3)
    with torch.no_grad():
        model[0].bias[4:] = -100
    return supervised(model, noise(16, 8), F.cross_entropy)


def frozen_and_unused() -> Run:
    model = nn.Sequential(mlp(8, 16, 16).requires_grad_(False), nn.Linear(16, 3))
    model.unused = nn.Linear(1000, 10)
    model.auxiliary = mlp(8, 32, 32, 1)
    run = supervised(model[:2], noise(16, 8), F.cross_entropy)
    optimizer = torch.optim.AdamW([*model[1].parameters(), *model.auxiliary.parameters(), *model.unused.parameters()])

    def losses(step: int) -> list[tuple[torch.optim.Optimizer, Tensor]]:
        x, y = noise(16, 8)(step)
        return [(optimizer, model.auxiliary(x).sum() * 0 + F.cross_entropy(model[:2](x), y))]

    return Run({"": model}, losses, after=run.after)


def zero_initialised_head() -> Run:
    model = mlp(8, 16, 16, 3)
    nn.init.zeros_(model[-1].weight)
    return supervised(model, noise(16, 8), F.cross_entropy)


def lora() -> Run:
    return supervised(
        nn.Sequential(LoRA(nn.Linear(8, 16)), nn.GELU(), LoRA(nn.Linear(16, 3))), noise(16, 8), F.cross_entropy
    )


def spikes() -> Run:
    model = mlp(8, 16, 3)
    run = supervised(model, lambda step: noise(16, 8, scale=100.0 if step in (5, 16, 24) else 1)(0), F.cross_entropy)
    clip = nn.utils.clip_grad_norm_
    run.edit_gradients = lambda step: clip(model.parameters(), 1.0) if step % 2 else None
    return run


def converged() -> Run:
    """A line is fitted exactly: gradients end at the last digits, and updates at nothing."""
    model, batch = nn.Linear(2, 1), line(width=2)
    x, y = batch(0)
    return supervised(model, lambda step: (x, y), F.mse_loss, make=torch.optim.SGD, lr=0.5)


def separated() -> Run:
    """Logits so far apart that the losses of most rows, and their gradients, are exactly zero."""
    model = nn.Linear(4, 2)
    x = torch.randn(32, 4)
    y = (x[:, 0] > 0).long()
    return supervised(model, lambda step: (x * 100, y), F.cross_entropy, make=torch.optim.SGD, lr=1.0)


HEALTHY: dict[str, Callable[[], Run]] = {
    "plain": lambda: supervised(mlp(8, 32, 32, 3), noise(16, 8), F.cross_entropy),
    "transformer": transformer,
    "transformer, bfloat16 autocast": lambda: transformer(autocast=torch.bfloat16),
    "transformer, float16 autocast and scaler": lambda: half(transformer(autocast=torch.float16)),
    "convolutions with batch norm": lambda: supervised(Flattened(), noise(8, 3, 8, 8), F.cross_entropy),
    "convolutions, float16 and scaler": lambda: half(
        supervised(Flattened(), noise(8, 3, 8, 8), F.cross_entropy, autocast=torch.float16)
    ),
    "lstm": lambda: supervised(Recurrent(nn.LSTM), noise(8, 20, 4), F.cross_entropy),
    "gru, large learning rate": lambda: supervised(Recurrent(nn.GRU), noise(8, 20, 4), F.cross_entropy, lr=0.05),
    "lora": lora,
    "experts": lambda: supervised(Experts(), noise(8, 8), F.cross_entropy),
    "zero-initialised head": zero_initialised_head,
    "dead units": dead_units,
    "frozen, unused and weighted with zero": frozen_and_unused,
    "warm-up from zero": warm_up,
    "warm-up from zero in bfloat16": warm_up_in_bfloat16,
    "bfloat16 weights": lambda: supervised(
        mlp(8, 32, 3).bfloat16(),
        lambda step: (torch.randn(16, 8).bfloat16(), torch.randint(0, 3, (16,))),
        lambda out, y: F.cross_entropy(out.float(), y),
        lr=1e-2,
    ),
    "sum over thousands": lambda: supervised(
        mlp(8, 16, 64),
        lambda step: (torch.randn(64, 8), torch.randn(64, 64)),
        nn.MSELoss(reduction="sum"),
    ),
    "targets of 1e4": lambda: supervised(mlp(8, 32, 1), line(1e4), F.mse_loss, lr=0.1),
    "targets of 1e4, summed": lambda: supervised(mlp(8, 32, 1), line(1e4), nn.MSELoss(reduction="sum"), lr=0.1),
    "targets of 1e8": lambda: supervised(mlp(8, 32, 1), line(1e8), F.mse_loss, lr=1.0),
    "raw timestamps": lambda: supervised(
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
        lambda step: (torch.rand(32, 4) * 1e9 + 1.7e9, torch.randint(0, 3, (32,))),
        F.cross_entropy,
    ),
    "inputs of high variance": lambda: supervised(
        mlp(8, 32, 3),
        lambda step: (torch.randn(16, 8) * torch.randn(16, 1).mul(4).exp(), torch.randint(0, 3, (16,))),
        F.cross_entropy,
    ),
    "gan": gan,
    "weight decay": lambda: supervised(mlp(8, 32, 3), noise(16, 8), F.cross_entropy, weight_decay=10.0, lr=1e-2),
    "spikes of a factor 100": spikes,
    "momentum": lambda: supervised(mlp(8, 32, 1), line(), F.mse_loss, make=torch.optim.SGD, lr=1e-2, momentum=0.9),
    "amsgrad": lambda: supervised(mlp(8, 32, 3), noise(16, 8), F.cross_entropy, amsgrad=True),
    "converged": converged,
    "separated": separated,
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_finding(name: str):
    run = HEALTHY[name]()
    assert run.findings() == ()
    assert all(math.isfinite(norm) for norm in run.norms) or run.scaler is not None


# Runs that go wrong


def only(findings: tuple[Finding, ...], code: str) -> Finding:
    [found] = [finding for finding in findings if finding.code == code]
    return found


def test_diverging_descent_is_named_before_it_overflows():
    model, batch = nn.Sequential(nn.Linear(4, 1)), line(width=4)
    x, y = batch(0)
    run = supervised(model, lambda step: (x, y), F.mse_loss, make=torch.optim.SGD, lr=20.0)
    outputs: list[float] = []
    model.register_forward_hook(lambda module, args, out: outputs.append(float(out.detach().abs().max())))
    findings = run.findings(num_steps=8)
    assert all(math.isfinite(norm) for norm in run.norms)

    first = sorted(run.norms)
    large = next(s for s, norm in enumerate(run.norms) if norm > 1e8 and norm > 1e4 * first[(max(s, 1) - 1) // 2])
    gradient = only(findings, "NH204")
    assert (gradient.location.phase, gradient.location.module, gradient.location.step) == ("backward", "0", large)
    assert gradient.location.tensor == "0.weight"
    assert gradient.severity == "warning"
    assert gradient.certainty == "observed"

    activation = only(findings, "NH104")
    scale = max(1.0, float(x.abs().max()))
    assert activation.location.step == next(s for s, out in enumerate(outputs) if out > 1e9 * scale)
    assert (activation.location.phase, activation.location.module) == ("forward", "0")
    assert {finding.code for finding in findings} == {"NH104", "NH204"}


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.inner = scale, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(x)


@pytest.mark.parametrize(
    "scales", [[20.0] * 12, [0.1] * 6 + [1e12] + [0.1] * 5], ids=["all amplify alike", "one amplifies"]
)
def test_residual_amplification_is_named_with_its_block(scales: list[float]):
    model = nn.Sequential(*(Block(scale) for scale in scales))
    x = torch.randn(16, 8)
    sizes, value = [], x.double()
    for block in model:
        weight, bias = (parameter.detach().double() for parameter in block.parameters())
        value = value + block.scale * F.linear(value, weight, bias)
        sizes.append(float(value.abs().max()))
    run = supervised(model, lambda step: (x, torch.zeros(16, 8)), F.mse_loss, lr=0.0)

    finding = only(run.findings(num_steps=1), "NH104")

    limit = 1e9 * max(1.0, float(x.abs().max()))
    assert finding.location.module == str(next(number for number, size in enumerate(sizes) if size > limit))
    assert finding.location.step == 0
    assert finding.evidence["class"] == "Block"


def test_tiny_initial_gain_gives_subnormal_gradients():
    model = mlp(*[64] * 10, gain=0.01)
    run = supervised(model, lambda step: (torch.randn(64, 64),) * 2, lambda out, _: out.square().mean(), lr=0.0)
    affected: list[str] = []

    def count(step: int) -> None:
        for name, parameter in model.named_parameters() if step == 0 else ():
            gradient = parameter.grad.double().abs()
            nonzero = gradient[gradient > 0]
            if len(nonzero) and (nonzero < torch.finfo(torch.float32).tiny).double().mean() >= 0.1:
                affected.append(name)

    run.edit_gradients = count
    finding = only(run.findings(num_steps=6), "NH206")
    assert len(affected) >= 4
    assert (finding.location.tensor, finding.location.step) == (affected[-1], 0)
    assert finding.location.module == affected[-1].rpartition(".")[0]
    assert finding.evidence["num_parameters"] == len(affected)
    assert "a CPU is 20 to 60 times slower on subnormal numbers" in finding.notes


def test_gradient_that_explodes_through_time_is_named_with_the_recurrence():
    model = Recurrent(nn.RNN)
    with torch.no_grad():
        model.rnn.weight_hh_l0.copy_(3 * torch.eye(12))
        model.rnn.weight_ih_l0.mul_(1e-16)
        model.rnn.bias_hh_l0.zero_()
        model.rnn.bias_ih_l0.zero_()
    run = supervised(model, lambda step: (torch.randn(8, 31, 4), torch.randint(0, 3, (8,))), F.cross_entropy, lr=0.0)
    run.losses(0)
    finding = only(run.findings(num_steps=2), "NH204")
    assert (finding.location.module, finding.location.step) == ("rnn", 0)


@pytest.mark.parametrize("step_of_spike", [3, 20])
def test_second_moment_at_infinity_is_named_with_its_weight(step_of_spike: int):
    model = mlp(4, 8, 3)
    run = supervised(model, noise(16, 4), F.cross_entropy)

    def edit(step: int) -> None:
        if step == step_of_spike:
            model[2].weight.grad[1, 5] = 1e21

    run.edit_gradients = edit
    finding = only(run.findings(), "NH303")
    assert finding.severity == "error"
    assert (finding.location.module, finding.location.tensor) == ("2", "2.weight")
    assert finding.evidence["first_index"] == [1, 5]
    known = finding.evidence["last_finite_step"]
    assert finding.location.step == step_of_spike or known < step_of_spike <= finding.location.step
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("lr", [1e-5, 1e-4])
def test_updates_lost_in_bfloat16_are_named(lr: float):
    model = mlp(64, 256, 256, 3).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.sign() * 0.1)
    batch = lambda step: (torch.randn(16, 64).bfloat16(), torch.randint(0, 3, (16,)))  # noqa: E731
    run = supervised(model, batch, lambda out, y: F.cross_entropy(out.float(), y), lr=lr, weight_decay=0.0)
    before = [parameter.clone() for parameter in model.parameters()]
    finding = only(run.findings(), "NH304")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (finding.location.phase, finding.location.module, finding.location.step) == ("optimizer", "", 1)
    assert finding.evidence["lr"] == lr


def test_a_scale_that_collapses_is_named_at_the_step_it_fell_below_every_use():
    model = nn.Sequential(nn.Linear(4, 1))
    run = supervised(model, lambda step: (torch.ones(8, 4), torch.ones(8, 1)), F.mse_loss)
    run.scaler = torch.amp.GradScaler("cpu")
    run.edit_gradients = lambda step: model[0].weight.grad.fill_(torch.nan)
    finding = only(run.findings(num_steps=200), "NH403")
    assert finding.severity == "error"
    assert finding.location.step == next(step for step in range(200) if 65536.0 * 0.5 ** (step + 1) < 1e-4)
    assert finding.evidence["last_scale"] == run.scaler.get_scale() == 0.0


def test_gradients_that_die_in_a_saturated_gate_are_named_with_it():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 3))
    with torch.no_grad():
        model[1].bias.fill_(200.0)
    run = supervised(model, noise(16, 8), F.cross_entropy, weight_decay=0.0)
    finding = only(run.findings(num_steps=8), "NH205")
    assert model[1].weight.grad.abs().max() == model[0].weight.grad.abs().max() == 0
    assert (finding.location.module, finding.location.tensor, finding.location.step) == ("2", "1.bias", 0)


def test_outputs_near_the_end_of_half_precision_are_named():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.fill_(1.5)
    outputs: list[float] = []
    model[0].register_forward_hook(lambda module, args, out: outputs.append(float(out.detach().abs().max())))
    batch = lambda step: (torch.rand(16, 4) * (1e3 if step < 2 else 7e3), torch.zeros(16).long())  # noqa: E731
    run = supervised(model, batch, F.cross_entropy, autocast=torch.float16, lr=0.0)
    finding = only(run.findings(num_steps=8), "NH102")
    assert (finding.location.module, finding.location.phase) == ("0", "forward")
    assert finding.location.step == next(step for step, value in enumerate(outputs) if value > 65504 / 4) == 2
    assert finding.evidence["limit"] == 65504
