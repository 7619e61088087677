"""The module tracer names where a step first went non-finite, going forward or back."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanhunt.observe import modules
from nanhunt.observe.modules import ModuleTracer


class Root(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.sqrt()


class Log(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.log()


class Zero(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value * 0


def model_with(middle: nn.Module) -> nn.Module:
    block = nn.Sequential(nn.Linear(3, 3), Zero(), middle)
    return nn.Sequential(nn.Linear(2, 3), block, nn.Linear(3, 1))


def traced(model: nn.Module, rows: Tensor | None = None) -> modules.ModuleFault | None:
    with ModuleTracer(model) as tracer:
        model(torch.ones(4, 2) if rows is None else rows).sum().backward()
        return tracer.fault()


def test_healthy_step_has_no_fault():
    assert traced(model_with(nn.Tanh())) is None


def test_first_module_with_a_non_finite_output_is_named():
    fault = traced(model_with(Log()))

    assert (fault.phase, fault.modules) == ("forward", ("1.2",))
    # The log, its block, the last layer and the model itself, of seven outputs.
    assert fault.message == "first non-finite output: 1.2 (4 of 7 outputs)"


def test_module_whose_backward_breaks_a_finite_gradient_is_named():
    fault = traced(model_with(Root()))

    assert (fault.phase, fault.modules) == ("backward", ("1.2",))
    assert fault.message.startswith("gradient first non-finite going back through 1.2")


def test_gradient_that_is_non_finite_from_the_loss_blames_no_inner_module():
    model = model_with(nn.Tanh())

    with ModuleTracer(model) as tracer:
        (model(torch.ones(4, 2)) * 0).sqrt().sum().backward()
        fault = tracer.fault()

    assert (fault.phase, fault.modules[0]) == ("backward", "2")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_module_is_followed(use_reentrant: bool):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(2, 3), nn.Sequential(Zero(), Root())

        def forward(self, value: Tensor) -> Tensor:
            return checkpoint(self.inner, self.first(value), use_reentrant=use_reentrant)

    fault = traced(Checkpointed())

    assert (fault.phase, fault.modules) == ("backward", ("inner.1",))


def test_modules_in_place_and_outputs_in_containers_are_taken_as_they_are():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.relu = nn.Linear(2, 2), nn.ReLU(inplace=True)

        def forward(self, *, rows: Tensor) -> dict[str, Tensor]:
            hidden = self.linear(rows)
            hidden += 1
            hidden = self.relu(hidden)
            return {"logits": hidden, "index": hidden.argmax()}

    model = Two()

    with ModuleTracer(model) as tracer:
        model(rows=torch.full((1, 2), math.inf))["logits"].sum().backward()
        fault = tracer.fault()

    assert fault.modules == ("linear",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_large_values_in_small_types_are_no_fault(dtype: torch.dtype):
    model = nn.Identity()

    with ModuleTracer(model) as tracer:
        model(torch.full((64,), 6e4, dtype=dtype))
        assert tracer.fault() is None
        model(torch.tensor([math.nan], dtype=torch.float32).to(dtype))
        assert tracer.fault().modules == ("",)


@pytest.mark.xfail(
    strict=True, reason="a sum in float32 overflows without an infinity; one in float64 costs 50 times as much"
)
def test_values_whose_sum_overflows_are_no_fault():
    model = nn.Identity()

    with ModuleTracer(model) as tracer:
        model(torch.full((4,), 3e38))

        assert tracer.fault() is None


def test_next_step_begins_with_nothing_seen():
    model = model_with(Log())

    with ModuleTracer(model) as tracer:
        model(torch.ones(4, 2)).sum().backward()
        assert tracer.fault() is not None
        tracer.begin_step()
        assert tracer.fault() is None


def test_looks_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(modules, "MAX_LOOKS", 10)
    model = nn.Linear(2, 2)

    with ModuleTracer(model) as tracer:
        for _ in range(50):
            model(torch.ones(1, 2))

        assert len(tracer._outputs) == 10


def test_hooks_are_gone_afterwards():
    model = model_with(nn.Tanh())

    with ModuleTracer(model), pytest.raises(RuntimeError):
        model(torch.ones(4, 5))

    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
