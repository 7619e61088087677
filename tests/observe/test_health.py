"""The health probe: what it sees is what float64 says, and nothing of the training is another for it."""

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nanhunt.observe import health_step
from nanhunt.observe.health import KEPT, MAX_PROBLEMS, HealthProbe
from nanhunt.records.health import Extent, Health, UpdateCount


def probed(model: nn.Module, run: Callable[[HealthProbe, int], Any], *, num_steps: int = 1) -> Health:
    """The records after some steps; nothing may have gone wrong."""
    with HealthProbe().attach(dict(model.named_modules())) as probe:
        for step in range(num_steps):
            probe.begin_step(step)
            run(probe, step)
        health = probe.records()
    assert health.problems == ()
    return health


def step_with(probe: HealthProbe, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    probe.before_optimizer_step(optimizer, names)
    optimizer.step()
    probe.after_optimizer_step(optimizer, names)


def sample_of(health: Health, name: str, step: int = 0):
    [module] = [module for module in health.modules if module.name == name]
    sample = module.at(step)
    assert sample is not None
    return sample


def extent(tensor: Tensor) -> Extent:
    """The oracle."""
    values = tensor.detach().double()
    return Extent(float(values.min()), float(values.max()), str(tensor.dtype).removeprefix("torch."))


# What it sees


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extremes_of_values_and_gradients_are_those_of_the_tensors(dtype: torch.dtype):
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(dtype)
    x = torch.randn(6, 5, dtype=dtype)
    hidden = model[0](x)
    squashed = model[1](hidden)
    y = model[2](squashed)
    gradients = torch.autograd.grad((y * 3).sum(), (hidden, squashed, y))

    health = probed(model, lambda probe, step: (model(x) * 3).sum().backward())

    assert sample_of(health, "0").input == extent(x)
    assert sample_of(health, "0").output == sample_of(health, "1").input == extent(hidden)
    assert sample_of(health, "1").output == sample_of(health, "2").input == extent(squashed)
    assert sample_of(health, "2").output == sample_of(health, "").output == extent(y)
    assert sample_of(health, "0").input_gradient is None
    assert sample_of(health, "0").output_gradient == sample_of(health, "1").input_gradient == extent(gradients[0])
    assert sample_of(health, "1").output_gradient == extent(gradients[1])
    assert sample_of(health, "2").output_gradient == extent(gradients[2])
    assert [module.name for module in health.modules] == ["0", "1", "2", ""]
    assert [module.kind for module in health.modules] == ["Linear", "Tanh", "Linear", "Sequential"]


def test_gradients_and_their_norm_are_those_of_the_parameters():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)

    def run(probe: HealthProbe, step: int) -> None:
        model(torch.randn(6, 5)).square().sum().backward()
        model[2].weight.grad.view(-1)[:5] = 0
        model[2].weight.grad.view(-1)[5:8] = 1e-40
        step_with(probe, model, optimizer)

    health = probed(model, run)

    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {seen.name: seen.samples[0].abs_max for seen in health.parameters} == {
        name: float(gradient.double().abs().max()) for name, gradient in gradients.items()
    }
    total = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
    assert health.steps[0].gradient_norm == pytest.approx(total, rel=1e-6)
    assert health.steps[0].lr == 0.25
    [head] = [seen for seen in health.parameters if seen.name == "2.weight"]
    assert (head.module, head.dtype, head.num_elements) == ("2", "float32", 14)
    assert head.samples[0].zero_share == pytest.approx(5 / 14)
    assert head.samples[0].subnormal_share == pytest.approx(3 / 14)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 6e4), (torch.bfloat16, 1e25), (torch.float32, 1e25)])
def test_a_norm_whose_squares_overflow_is_given_as_far_as_it_is_known(dtype: torch.dtype, value: float):
    weight = nn.Parameter(torch.ones(4, dtype=dtype))
    model = nn.Module()
    model.weight = weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def run(probe: HealthProbe, step: int) -> None:
        weight.grad = torch.full_like(weight, value)
        step_with(probe, model, optimizer)

    norm = probed(model, run).steps[0].gradient_norm
    assert norm is not None
    assert norm == pytest.approx(value * (2 if dtype is torch.float16 else 1), rel=1e-2)


def test_module_called_twice_has_the_extremes_of_both_calls():
    model = nn.ReLU()
    health = probed(model, lambda probe, step: [model(torch.tensor([value])) for value in (2.0, 9.0, 3.0)])
    assert sample_of(health, "").output == Extent(2.0, 9.0, "float32")


@dataclass
class Outputs:
    first: Tensor
    second: Tensor


class Odd(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.form = form

    def forward(self, *, x: Tensor, ids: Tensor | None = None) -> Any:
        return self.form(x * 2, x * -3)


@pytest.mark.parametrize(
    "form", [lambda a, b: {"a": a, "b": [b]}, lambda a, b: (a, (b, None)), Outputs, lambda a, b: [a, b, 7, "text"]]
)
def test_keyword_arguments_and_nested_outputs_are_seen(form: Callable[[Tensor, Tensor], Any]):
    model = Odd(form)
    x = torch.tensor([1.0, 5.0], requires_grad=True)

    def run(probe: HealthProbe, step: int) -> None:
        given = x * 1
        model(x=given, ids=torch.tensor([10**6]))
        (given * 4).sum().backward()

    sample = sample_of(probed(model, run), "")
    assert sample.input == Extent(1.0, 5.0, "float32")
    assert sample.output == Extent(-15.0, 10.0, "float32")
    assert sample.input_gradient == Extent(4.0, 4.0, "float32")


def test_the_element_type_nearest_to_its_limit_is_the_one_given():
    model = Odd(lambda a, b: (a.half(), b.double() * 1e6))
    health = probed(model, lambda probe, step: model(x=torch.tensor([10.0])))
    assert sample_of(health, "").output == Extent(20.0, 20.0, "float16")


def test_in_place_module_shows_what_it_was_given():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    with torch.no_grad():
        model[0].weight.copy_(-torch.eye(3))
        model[0].bias.zero_()
    health = probed(model, lambda probe, step: model(torch.tensor([[4.0, -2.0, 1.0]])).sum().backward())
    assert sample_of(health, "1").input == Extent(-4.0, 2.0, "float32")
    assert sample_of(health, "1").output == Extent(0.0, 2.0, "float32")


def test_views_that_are_changed_in_place_are_no_obstacle():
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left, right = x.chunk(2, dim=1)
            return left.clone().mul_(right)

    model = nn.Sequential(nn.Linear(4, 8), Halves(), nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(4, 1))

    def run(probe: HealthProbe, step: int) -> None:
        hidden = model[0](torch.randn(3, 4))
        hidden[:, 0] += 1
        model[4](model[1](hidden).view(3, 4)).sum().backward()

    assert sample_of(probed(model, run), "1").input_gradient is not None


def test_infinities_and_nan_are_kept_as_they_are():
    model = nn.Identity()
    relu = nn.Sequential(nn.ReLU(), model)
    health = probed(relu, lambda probe, step: relu(torch.tensor([math.inf, 1.0])))
    assert sample_of(health, "0").output == Extent(1.0, math.inf, "float32")
    health = probed(relu, lambda probe, step: relu(torch.tensor([math.nan, 1.0])))
    assert math.isnan(sample_of(health, "0").output.magnitude)


@pytest.mark.parametrize("sparse", [False, True])
def test_sparse_gradients_count_as_zero_where_they_store_nothing(sparse: bool):
    model = nn.Embedding(10, 2, sparse=sparse)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run(probe: HealthProbe, step: int) -> None:
        (model(torch.tensor([1, 4])) * 5).sum().backward()
        step_with(probe, model, optimizer)

    [weight] = probed(model, run).parameters
    assert weight.samples[0].abs_max == 5
    assert weight.samples[0].zero_share == pytest.approx(0.8)
    assert weight.samples[0].subnormal_share == 0


@pytest.mark.parametrize(("lr", "changed"), [(1e-3, 0), (1e-1, 300)])
def test_weights_that_bfloat16_cannot_move_are_counted(lr: float, changed: int):
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
    model.still = nn.Parameter(torch.ones(5))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def run(probe: HealthProbe, step: int) -> None:
        model.weight.grad = torch.ones_like(model.weight)
        model.still.grad = torch.zeros_like(model.still)
        step_with(probe, model, optimizer)

    updates = [step.updates for step in probed(model, run, num_steps=4).steps]
    assert updates[0] == UpdateCount(300, changed, 0, 0, is_thorough=False)
    if changed == 0:
        assert updates[1:] == [UpdateCount(300, 0, 300, 0, is_thorough=True)] * 3


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda p: torch.optim.AdamW(p), "exp_avg_sq"),
        (lambda p: torch.optim.Adam(p, amsgrad=True, foreach=False), "exp_avg_sq"),
        (lambda p: torch.optim.RMSprop(p), "square_avg"),
        (lambda p: torch.optim.Adagrad(p), "sum"),
    ],
)
def test_second_moment_at_infinity_is_found_in_the_step_that_made_it(make: Any, key: str):
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())

    def run(probe: HealthProbe, step: int) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        if step == 5:
            model.weight.grad[1, 2] = 1e22
        step_with(probe, model, optimizer)

    [moment] = [moment for moment in probed(model, run, num_steps=7).moments if moment.key == key]
    assert torch.isfinite(model.weight).all()
    assert (moment.parameter, moment.step, moment.num_infinite, moment.num_elements) == ("weight", 5, 1, 6)
    assert moment.first_index == (1, 2)


def test_scales_are_kept_where_they_change():
    probe = HealthProbe()
    for step, scale in enumerate([4.0, 4.0, 2.0, 2.0, 1.0]):
        probe.begin_step(step)
        probe.note_scale(scale, scale < 4)
    assert [(seen.step, seen.scale, seen.is_skipped) for seen in probe.records().scales] == [
        (0, 4.0, False),
        (2, 2.0, True),
        (4, 1.0, True),
    ]


# When it looks


def test_steps_are_sampled_ever_more_rarely():
    model = nn.Sequential(nn.ReLU())
    health = probed(model, lambda probe, step: model(torch.ones(1)), num_steps=200)
    assert [step.step for step in health.steps] == [*range(8), *range(8, 128, 8), 128, 160, 192]
    assert health.num_steps == 200


def test_steps_after_an_odd_one_are_sampled():
    model = nn.Sequential(nn.ReLU())
    health = probed(model, lambda probe, step: model(torch.tensor([100.0 if step == 16 else 1.0])), num_steps=30)
    assert [step.step for step in health.steps if step.step > 8] == [16, 17, 18, 19, 20, 24]


def test_history_is_thinned_and_keeps_its_two_ends():
    model = nn.Sequential(nn.ReLU())
    health = probed(model, lambda probe, step: model(torch.ones(1)), num_steps=3000)
    steps = [step.step for step in health.steps]
    assert len(steps) <= KEPT
    assert steps[:8] == [*range(8)]
    assert steps[-2:] == [2944, 2976]
    assert steps == sorted(set(steps))
    assert len(health.modules[0].samples) == len(steps)


def test_calls_of_modules_are_heard_on_sampled_steps_only():
    model = nn.Sequential(nn.ReLU())
    original = nn.Module.__call__
    probe = HealthProbe().attach(dict(model.named_modules()))
    for step in range(10):
        probe.begin_step(step)
        model(torch.ones(1))
        assert (nn.Module.__call__ is original) == (step == 9)
        assert not torch_module._has_any_global_hook()
    probe.records()


# What it leaves alone


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True) for _ in "ab")
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x.mean(1)))


def train(with_probe: bool, num_steps: int = 12) -> list[Tensor]:
    torch.manual_seed(3)
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    probe = HealthProbe().attach(dict(model.named_modules())) if with_probe else None
    for step in range(num_steps):
        if probe:
            probe.begin_step(step)
        optimizer.zero_grad()
        loss = model(torch.randint(0, 9, (4, 5))).square().mean()
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        if probe:
            step_with(probe, model, optimizer)
        else:
            optimizer.step()
    if probe:
        assert probe.records().problems == ()
    seen += [*model.state_dict().values(), *(value for state in optimizer.state.values() for value in state.values())]
    return [*seen, torch.get_rng_state()]


def test_every_bit_of_the_training_is_the_same():
    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


def test_no_tensor_outlives_its_step():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = []

    def run(probe: HealthProbe, step: int) -> None:
        x = torch.randn(2, 3, requires_grad=True)
        y = model(x)
        y.sum().backward()
        step_with(probe, model, optimizer)
        kept.append((weakref.ref(x), weakref.ref(y), len(x._backward_hooks or ())))

    gc.disable()
    try:
        probed(model, run, num_steps=3)
        assert [(x(), y()) for x, y, _ in kept] == [(None, None)] * 3
    finally:
        gc.enable()


def test_hooks_on_tensors_that_stay_are_taken_away():
    model = nn.Sequential(nn.Linear(3, 3))
    x = torch.randn(2, 3, requires_grad=True)
    health = probed(model, lambda probe, step: model(x).sum().backward(), num_steps=3)
    assert not x._backward_hooks
    assert sample_of(health, "0").input_gradient == extent(model[0].weight.detach().sum(0))


def test_hooks_and_modules_are_let_go():
    model = nn.Sequential(nn.ReLU())
    gone = weakref.ref(model[0])
    with HealthProbe().attach(dict(model.named_modules())) as probe:
        probe.begin_step(0)
        model(torch.ones(1))
    assert not torch_module._has_any_global_hook()
    del model
    gc.collect()
    assert gone() is None
    assert [module.kind for module in probe.records().modules] == ["ReLU", "Sequential"]


def test_a_model_can_be_copied_and_saved_during_a_sampled_step():
    model = nn.Sequential(nn.Linear(2, 2))

    def run(probe: HealthProbe, step: int) -> None:
        model(torch.ones(1, 2))
        copy.deepcopy(model)(torch.full((1, 2), 1e6))
        pickle.dumps(model)

    assert sample_of(probed(model, run), "0").input == Extent(1.0, 1.0, "float32")


def test_a_dispatch_mode_does_not_see_it():
    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    optimizer = torch.optim.AdamW(model.parameters())

    def operations(probe: HealthProbe) -> list[str]:
        with Counting() as mode:
            optimizer.zero_grad()
            model(torch.ones(2, 3)).sum().backward()
            step_with(probe, model, optimizer)
        return mode.seen

    operations(HealthProbe())
    plain = operations(HealthProbe())
    with HealthProbe().attach(dict(model.named_modules())) as probe:
        probe.begin_step(0)
        assert operations(probe) == plain
        probe.begin_step(1)
        assert sample_of(probe.records(), "0").output_gradient is not None


def test_functional_transforms_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 1))

    def run(probe: HealthProbe, step: int) -> None:
        parameters = dict(model.named_parameters())

        def loss(given: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(model, given, (x,)).sum()

        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, torch.ones(4, 3))

    probed(model, run)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_is_seen_without_gradients(mode: Any):
    model = nn.Sequential(nn.Linear(3, 3)).eval()

    def run(probe: HealthProbe, step: int) -> None:
        with mode():
            model(torch.ones(2, 3))

    sample = sample_of(probed(model, run), "0")
    assert sample.input == Extent(1.0, 1.0, "float32")
    assert sample.output_gradient is None


def test_a_graph_kept_beyond_the_step_is_not_looked_at_again():
    model = nn.Sequential(nn.Linear(3, 3))
    losses: list[Tensor] = []

    def run(probe: HealthProbe, step: int) -> None:
        losses.append(model(torch.ones(2, 3)).sum())
        if step:
            (losses[0] * 1e6).backward()

    health = probed(model, run, num_steps=2)
    assert [sample_of(health, "0", step).output_gradient for step in (0, 1)] == [None, None]


def test_autocast_outputs_are_seen_in_their_own_type():
    model = nn.Sequential(nn.Linear(3, 3))

    def run(probe: HealthProbe, step: int) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            F.mse_loss(model(torch.ones(2, 3)).float(), torch.zeros(2, 3)).backward()

    sample = sample_of(probed(model, run), "0")
    assert (sample.input.dtype, sample.output.dtype, sample.output_gradient.dtype) == (
        "float32",
        "bfloat16",
        "bfloat16",
    )


def test_its_own_failures_become_problems(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any) -> Any:
        raise RuntimeError("out of order")

    model = nn.Sequential(nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = HealthProbe().attach(dict(model.named_modules()))
    monkeypatch.setattr(health_step, "_real", fail)
    for step in range(40):
        probe.begin_step(step)
        model(torch.ones(2, 3)).sum().backward()
        step_with(probe, model, optimizer)
    problems = probe.records().problems
    assert problems[0] == "step 0: RuntimeError: out of order"
    assert 0 < len(problems) <= MAX_PROBLEMS
    assert not torch_module._has_any_global_hook()
