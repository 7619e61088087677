"""``nanhunt.compare_compiled``: where a fault exists, how far each run lies from float64, and what is left behind."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nanhunt


class Net(nn.Module):
    """Random numbers, a buffer that changes, and a logarithm that fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout()
        self.last = nn.Linear(8, 2)

    def forward(self, x_BC: Tensor, shift: float = 2.0) -> Tensor:
        h_BC = self.dropout(self.norm(self.first(x_BC)))
        return self.last((h_BC.tanh() + shift).log())


def cross_entropy(model: Callable[..., Tensor], batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def as_is(graph: Any, inputs: Any) -> Any:
    return graph.forward


def broken(graph: Any, inputs: Any) -> Any:
    """A compiler with a bug: it divides every floating result by zero."""
    return lambda *args: tuple(result / 0 for result in graph.forward(*args))


def refusing(graph: Any, inputs: Any) -> Any:
    raise ValueError("no such instruction")


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    # Compiling switches the checks of torch.distributions off for good.
    torch.distributions.Distribution.set_default_validate_args(True)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(6, 4), "y": torch.tensor([0, 1, 0, 1, 0, 1])}


def test_a_healthy_step_has_no_fault_and_the_same_values_thrice(batch: dict[str, Tensor]) -> None:
    found = nanhunt.compare_compiled(Net(), batch, cross_entropy, backend=as_is)
    assert found.verdict == "the fault exists in neither"
    assert found.apart is not None
    assert found.apart.absolute == 0.0
    assert found.eager.loss == found.compiled.loss == pytest.approx(found.float64.loss, rel=1e-5)
    assert [run.num_gradients for run in (found.eager, found.compiled, found.float64)] == [6, 6, 6]
    assert 0 < found.eager.difference.relative < 1e-5
    assert found.first is None
    assert found.notes == ("the step draws random numbers; those of float64 may be others",)


def test_nothing_is_left_behind(batch: dict[str, Tensor]) -> None:
    model = Net()
    cross_entropy(model, batch).backward()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    given = {name: tensor.clone() for name, tensor in batch.items()}
    nanhunt.compare_compiled(model, batch, cross_entropy, backend=as_is)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name][0]
        assert torch.equal(parameter.grad, gradients[name][1])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
    assert all(torch.equal(tensor, given[name]) for name, tensor in batch.items())
    assert torch.get_default_dtype() is torch.float32


def test_a_fault_in_the_code_is_in_both_and_has_its_place(batch: dict[str, Tensor]) -> None:
    def loss(model: Callable[..., Tensor], batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"], -2.0), batch["y"])

    found = nanhunt.compare_compiled(Net(), batch, loss, backend=as_is)
    assert found.verdict == "the fault exists in both"
    assert found.eager.harmed[0] == "loss"
    assert "gradient of first.weight" in found.eager.harmed
    assert found.notes[0] == "float64 is not finite either"
    assert found.first.location.op == "aten::log"
    assert found.first.location.source.text == "return self.last((h_BC.tanh() + shift).log())"


def test_a_fault_of_the_compiler_is_in_compiled_code_only(batch: dict[str, Tensor]) -> None:
    found = nanhunt.compare_compiled(Net().eval(), batch, cross_entropy, backend=broken)
    assert found.verdict == "the fault exists in compiled code only"
    assert found.first is None
    assert found.eager.harmed == ()
    assert found.notes == ()


def test_precision_is_judged_by_float64() -> None:
    def cancelled(x: Tensor) -> Tensor:
        return (x + 1) - x

    found = nanhunt.compare_compiled(cancelled, torch.tensor([512.0], dtype=torch.bfloat16), backend=as_is)
    assert found.verdict == "the fault exists in neither"
    assert (found.eager.difference.name, found.eager.difference.absolute) == ("output 0", 1.0)


def test_an_overflow_of_half_precision_is_none_in_float64() -> None:
    def ratio(x: Tensor) -> Tensor:
        return (x * x) / x

    x = torch.tensor([300.0], dtype=torch.float16, requires_grad=True)
    found = nanhunt.compare_compiled(ratio, (x,), backend=as_is)
    assert found.verdict == "the fault exists in both"
    assert found.eager.harmed == ("output 0", "gradient of input 0")
    assert found.float64.harmed == ()
    assert found.notes == ("float64 is finite: more precision removes the fault",)
    assert found.first.location.op == "aten::mul"
    assert x.grad is None


def test_a_fault_of_the_backward_pass_alone_is_found_in_the_gradient_of_an_input() -> None:
    def root(x: Tensor) -> Tensor:
        return (x * 0).sqrt()

    found = nanhunt.compare_compiled(root, {"x": torch.ones(2, requires_grad=True)}, backend=as_is)
    assert found.eager.harmed == ("gradient of input 0",)
    assert (found.first.location.phase, found.first.location.forward_op) == ("backward", "aten::sqrt")


def test_masked_outputs_are_no_fault_where_the_loss_is_finite() -> None:
    def loss(model: Callable[..., Tensor], batch: Tensor) -> Tensor:
        return model(batch).softmax(0).square().sum()

    def masked(x: Tensor) -> Tensor:
        return x.masked_fill(x > 1, -torch.inf)

    found = nanhunt.compare_compiled(masked, torch.tensor([0.0, 1.0, 2.0]), loss, backend=as_is)
    assert found.eager.nonfinite == ("output 0",)
    assert found.verdict == "the fault exists in neither"


def test_what_is_compiled_already_is_called_as_it_is(batch: dict[str, Tensor]) -> None:
    calls = []

    def counting(graph: Any, inputs: Any) -> Any:
        calls.append("compiled")
        return graph.forward

    whole, part = torch.compile(Net().eval(), backend=counting), Net().eval()
    part.first = torch.compile(part.first, backend=counting)
    in_place = Net().eval()
    in_place.compile(backend=counting)
    for model in (whole, part, in_place):
        calls.clear()
        # What was compiled for one instance serves the others as well.
        torch._dynamo.reset()
        found = nanhunt.compare_compiled(model, batch, cross_entropy, backend=refusing)
        assert calls == ["compiled"]
        assert found.verdict == "the fault exists in neither"
        assert found.float64.skipped == ""


def test_a_step_that_cannot_be_compiled_says_why(batch: dict[str, Tensor]) -> None:
    found = nanhunt.compare_compiled(Net(), batch, cross_entropy, backend=refusing)
    assert "refusing" in found.compiled.skipped
    assert found.verdict == "the fault does not exist in eager code; compiled code did not run"
    assert "compiled code  not run      BackendCompilerFailed" in str(found)


def test_an_error_of_the_step_is_told_from_a_fault() -> None:
    def step(x: Tensor) -> Tensor:
        if x.numel() > 1:
            raise ValueError("one element only")
        return x

    found = nanhunt.compare_compiled(step, torch.ones(2), backend=as_is)
    assert found.eager.error == "ValueError: one element only"
    assert found.verdict.startswith("the error exists in")


def test_code_that_insists_on_a_type_is_not_run_in_float64() -> None:
    def step(x: Tensor) -> Tensor:
        return x @ torch.ones(2, 2, dtype=torch.float32)

    found = nanhunt.compare_compiled(step, torch.ones(2, 2), backend=as_is)
    assert found.float64.skipped.startswith("RuntimeError: expected m1 and m2 to have the same dtype")
    assert found.eager.difference is None


def test_an_unknown_backend_is_the_callers_error() -> None:
    with pytest.raises(RuntimeError, match="nosuch"):
        nanhunt.compare_compiled(torch.sin, torch.ones(2), backend="nosuch")


def test_the_text_fits_80_columns(batch: dict[str, Tensor]) -> None:
    def loss(model: Callable[..., Tensor], batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"], -2.0), batch["y"])

    text = str(nanhunt.compare_compiled(Net(), batch, loss, backend=as_is))
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("one step as written, compiled by as_is, and in float64\n")
    assert "  eager code     NON-FINITE   nan\n" in text
    assert "  non-finite in eager code: output 0, loss, gradient of first.weight and 5\n    others\n" in text
    assert "verdict: the fault exists in both\n" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_folds_what_fails_in_eager_code() -> None:
    def step(zeroed: Tensor, root: Tensor, half: Tensor, brain: Tensor, large: Tensor) -> tuple[Tensor, ...]:
        dropped = nn.functional.dropout(large)
        return zeroed * 0, (root * 0).sqrt(), (half * half) / half, (brain + 1) - brain, dropped

    batch = (
        torch.tensor([torch.inf, 1.0, torch.nan]),
        torch.ones(2, requires_grad=True),
        torch.tensor([300.0], dtype=torch.float16),
        torch.tensor([512.0], dtype=torch.bfloat16),
        torch.full((64,), 1000.0),
    )
    found = nanhunt.compare_compiled(step, batch)
    assert found.eager.harmed == ("output 0", "output 2", "gradient of input 1")
    assert found.compiled.harmed == ()
    assert found.float64.harmed == ("output 0", "gradient of input 1")
    assert found.verdict == "the fault exists in eager code only"
    # Not output 4: compiled code draws the random numbers of eager code.
    assert found.apart.name == "output 3"
    assert found.backend == "inductor"
