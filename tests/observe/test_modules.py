"""The module tracer names where a step first went non-finite, going forward or back."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
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

    assert (fault.phase, fault.modules) == ("backward", ())
    assert fault.message.startswith("gradient non-finite before it comes to the model: from the loss")


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
    layer = nn.Linear(2, 2)
    model = nn.ModuleList([layer])

    with ModuleTracer(model) as tracer:
        for _ in range(50):
            layer(torch.ones(1, 2))

        assert len(tracer._step.looks) == 10


def test_hooks_are_gone_afterwards():
    model = model_with(nn.Tanh())

    with ModuleTracer(model) as tracer, pytest.raises(RuntimeError):
        model(torch.ones(4, 5))
    model(torch.ones(4, 2)).sum().backward()

    assert not module_hooks._global_forward_hooks
    assert not module_hooks._global_forward_pre_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(tracer._step.calls) == 2


def test_hook_on_an_input_of_the_loop_is_gone_with_the_step():
    rows = torch.zeros(1, 2, requires_grad=True)

    with ModuleTracer(Root()) as tracer:
        tracer._model(rows).sum().backward()
        assert tracer.fault().modules == ("",)
        assert rows._backward_hooks
        tracer.begin_step()

    assert not rows._backward_hooks


def test_other_models_are_passed_over():
    with ModuleTracer(model_with(nn.Tanh())) as tracer:
        model_with(Log())(torch.ones(4, 2))

        assert tracer.fault() is None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fused_evaluation_of_a_transformer_stays_bit_for_bit():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    rows = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def ops_and_result() -> tuple[set[str], Tensor]:
        with torch.no_grad(), torch.profiler.profile() as profile:
            result = model(rows, src_key_padding_mask=padding)
        return {event.key for event in profile.key_averages()}, result

    ops, expected = ops_and_result()
    with ModuleTracer(model) as tracer:
        traced_ops, result = ops_and_result()
        assert tracer.fault() is None

    assert "aten::_transformer_encoder_layer_fwd" in ops
    assert "aten::_transformer_encoder_layer_fwd" in traced_ops
    assert torch.equal(result, expected)


class Mask(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -math.inf)


class Attention(nn.Module):
    """Masked scores, the softmax as a module or not, and something after it."""

    def __init__(self, after: nn.Module, *, has_softmax_module: bool) -> None:
        super().__init__()
        self.mask, self.after = Mask(), after
        self.softmax = nn.Softmax(-1) if has_softmax_module else None

    def forward(self, scores: Tensor) -> Tensor:
        masked = self.mask(scores)
        weights = self.softmax(masked) if self.softmax else masked.softmax(-1)
        return self.after(weights)


@pytest.mark.parametrize("has_softmax_module", [True, False])
def test_mask_that_softmax_removes_is_not_named(has_softmax_module: bool):
    scores = torch.randn(3, 3, requires_grad=True)

    assert traced(Attention(nn.Linear(3, 3), has_softmax_module=has_softmax_module), scores) is None
    # The logarithm of the weights that the mask made zero.
    fault = traced(Attention(Log(), has_softmax_module=has_softmax_module), scores)
    assert (fault.phase, fault.modules) == ("forward", ("after",))


def test_fully_masked_row_is_laid_to_the_softmax():
    class Everything(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return torch.full_like(scores, -math.inf)

    model = Attention(nn.Linear(3, 3), has_softmax_module=True)
    model.mask = Everything()

    assert traced(model, torch.randn(3, 3)).modules == ("softmax",)


def test_masked_logits_of_the_model_are_no_fault_where_the_loss_is_finite():
    model = nn.Sequential(nn.Linear(3, 3), Mask())

    with ModuleTracer(model) as tracer:
        logits = model(torch.randn(3, 3))
        nn.functional.cross_entropy(logits, torch.arange(3)).backward()

        assert tracer.fault(loss_is_finite=True) is None


def test_module_with_a_weight_that_is_not_finite_is_named_though_it_is_not_looked_at():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    with torch.no_grad():
        model[1].weight[0] = math.nan

    assert traced(model).modules == ("1",)


def test_non_finite_input_is_said():
    fault = traced(model_with(nn.Tanh()), torch.full((4, 2), math.nan))

    assert (fault.modules, fault.from_input) == (("0",), True)
    assert "0, from a non-finite input" in fault.message


class Parts(nn.Module):
    """A model of named parts and a way to put them together."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, rows: Tensor) -> Tensor:
        return self.run(self, rows)


class Pair(nn.Module):
    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return value + 1, (value * 0).sqrt()


@dataclass
class Output:
    logits: Tensor
    note: str = ""


class Wrapped(nn.Module):
    def forward(self, *, value: Tensor) -> Output:
        return Output((value * 0).sqrt())


class InPlaceRoot(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.mul_(0).sqrt_()


SHAPES = {
    "residual": (Parts(lambda m, x: x + m.f(m.a(x)), a=nn.Linear(2, 2), f=nn.Sequential(Zero(), Root())), ("f.1",)),
    "tuple-output": (Parts(lambda m, x: sum(m.pair(m.a(x))), a=nn.Linear(2, 2), pair=Pair()), ("pair",)),
    "keyword-and-dataclass": (
        Parts(lambda m, x: m.b(m.w(value=m.a(x)).logits), a=nn.Linear(2, 2), w=Wrapped(), b=nn.Linear(2, 2)),
        ("w",),
    ),
    "two-heads": (
        Parts(lambda m, x: m.good(m.a(x)) + m.bad(m.a(x) * 0), a=nn.Linear(2, 2), good=nn.Linear(2, 2), bad=Root()),
        ("bad",),
    ),
    "shared-module": (
        Parts(lambda m, x: m.s(m.zero(m.s(m.a(x) ** 2 + 1))), a=nn.Linear(2, 2), s=Root(), zero=Zero()),
        ("s",),
    ),
    "in-place": (
        Parts(
            lambda m, x: m.b(m.p(m.a(m.r(x + 0)))),
            r=nn.ReLU(True),
            a=nn.Linear(2, 2),
            p=InPlaceRoot(),
            b=nn.Linear(2, 2),
        ),
        ("p",),
    ),
    "lstm": (
        Parts(
            lambda m, x: m.lstm(m.root(m.zero(m.a(x))))[0],
            a=nn.Linear(2, 2),
            zero=Zero(),
            root=Root(),
            lstm=nn.LSTM(2, 3),
        ),
        ("root",),
    ),
    "attention": (
        Parts(
            lambda m, x: m.att(*[m.root(m.zero(m.a(x)))] * 3)[0],
            a=nn.Linear(2, 2),
            zero=Zero(),
            root=Root(),
            att=nn.MultiheadAttention(2, 1),
        ),
        ("root",),
    ),
    "nested-sequential": (
        nn.Sequential(
            nn.Sequential(nn.Linear(2, 2), nn.Sequential(Zero(), nn.Sequential(Root(), nn.ReLU()))), nn.Linear(2, 1)
        ),
        ("0.1.1.0",),
    ),
    "own-code-of-the-model": (Parts(lambda m, x: (m.a(x) * 0).sqrt(), a=nn.Linear(2, 2)), ("",)),
    "own-code-of-a-container": (
        nn.Sequential(
            nn.Linear(2, 2), Parts(lambda m, x: m.b((m.a(x) * 0).sqrt()), a=nn.Linear(2, 2), b=nn.Linear(2, 2))
        ),
        ("1",),
    ),
    "several-takers": (
        Parts(
            lambda m, x: m.q(m.z(m.a(x))) + m.k(m.z(m.a(x))), a=nn.Linear(2, 2), z=Zero(), q=Root(), k=nn.Linear(2, 2)
        ),
        ("q",),
    ),
    "tied-weights": (
        Parts(
            lambda m, x: nn.functional.linear(m.root(m.zero(m.a(x))), m.a.weight),
            a=nn.Linear(2, 2),
            zero=Zero(),
            root=Root(),
        ),
        ("root",),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_module_that_breaks_the_gradient_is_named_in_any_shape(name: str):
    model, expected = SHAPES[name]

    fault = traced(model)

    assert (fault.phase, fault.modules) == ("backward", expected)


FORWARD_SHAPES = {
    "residual": (Parts(lambda m, x: x + m.f(m.a(x)), a=nn.Linear(2, 2), f=nn.Sequential(Zero(), Log())), ("f.1",)),
    "beside-a-finite-branch": (
        Parts(lambda m, x: m.bad(x * 0) + m.good(x), bad=Log(), good=nn.Linear(2, 2)),
        ("bad",),
    ),
    "own-code": (Parts(lambda m, x: m.b((m.a(x) * 0).log()), a=nn.Linear(2, 2), b=nn.Linear(2, 2)), ("",)),
    "keyword-and-dataclass": (
        Parts(lambda m, x: m.log(m.w(value=m.a(x)).logits), a=nn.Linear(2, 2), w=Wrapped(), log=Log()),
        ("log",),
    ),
}


@pytest.mark.parametrize("name", FORWARD_SHAPES)
def test_module_whose_output_is_first_non_finite_is_named_in_any_shape(name: str):
    model, expected = FORWARD_SHAPES[name]

    fault = traced(model)

    assert (fault.phase, fault.modules) == ("forward", expected)


def test_error_inside_a_forward_that_the_model_catches_leaves_no_trace():
    class Failing(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            raise ArithmeticError

    def run(model: nn.Module, rows: Tensor) -> Tensor:
        with contextlib.suppress(ArithmeticError):
            model.failing(rows)
        return model.block(rows)

    model = Parts(run, failing=Failing(), block=nn.Sequential(nn.Linear(2, 2), Zero(), Root()))

    for _ in range(2):
        assert traced(model).modules == ("block.2",)


def test_results_are_the_same_bit_for_bit():
    def run(*, is_traced: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 1)
        )
        rows = torch.randn(16, 4, requires_grad=True)
        with ModuleTracer(model) if is_traced else contextlib.nullcontext():
            loss = (model(rows) ** 2).mean()
            loss.backward()
        return [loss, rows.grad, *(parameter.grad for parameter in model.parameters()), *model.buffers()]

    assert all(map(torch.equal, run(is_traced=True), run(is_traced=False)))


def test_values_that_cannot_be_read_are_passed_over():
    model = nn.Sequential(nn.Linear(2, 2), Root())

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (row,)).sum()

    with ModuleTracer(model) as tracer:
        torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(model.named_parameters()), torch.ones(4, 2))
        model.to("meta")(torch.ones(1, 2, device="meta"))

        assert tracer.fault() is None


def test_checks_under_inference_mode():
    model = nn.Sequential(nn.Linear(2, 2), Log(), nn.Identity())

    with ModuleTracer(model) as tracer, torch.inference_mode():
        model(torch.zeros(1, 2) - math.inf)

        assert tracer.fault().modules == ("0",)


def test_second_of_two_outputs_of_one_op_has_its_own_gradient():
    class Halves(nn.Module):
        def forward(self, value: Tensor) -> tuple[Tensor, ...]:
            return value.unbind(1)

    model = Parts(
        lambda m, x: m.root(m.zero((h := m.halves(m.a(x)))[1])) + h[0],
        a=nn.Linear(2, 2),
        halves=Halves(),
        zero=Zero(),
        root=Root(),
    )
    with ModuleTracer(model) as tracer:
        model(torch.ones(4, 2)).sum().backward()
        gradients = [look.gradient for look in tracer._step.calls[2].outputs]

    assert gradients == [modules.FINITE, modules.NAN]


def test_container_is_named_where_its_own_code_fails_after_a_mask_it_removed():
    model = Parts(lambda m, x: m.after(m.mask(x).softmax(-1)).sub(9).log(), mask=Mask(), after=nn.Linear(3, 3))

    assert traced(nn.Sequential(model), torch.randn(3, 3)).modules == ("0",)


def test_forward_after_one_that_failed_begins_afresh():
    model = model_with(nn.Tanh())

    with ModuleTracer(model) as tracer:
        with pytest.raises(RuntimeError):
            model(torch.ones(4, 5))
        (model(torch.ones(4, 2)) * 0).sqrt().sum().backward()

        assert tracer.fault().modules == ()
