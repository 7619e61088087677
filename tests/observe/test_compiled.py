"""Compiled code under ``nanhunt.trace``: run as it is written, said so, and compiled as before once it is over."""

import functools
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._dynamo.utils import counters

import nanhunt
from nanhunt.observe.as_written import AsWritten


class Net(nn.Module):
    """A normalised layer with state of its own; its logarithm fails for every negative element."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x_BC: Tensor) -> Tensor:
        h_BC = self.norm(self.inner(x_BC))
        return h_BC.log() if self.training else h_BC.exp()


def squared(x: Tensor) -> Tensor:
    return (x * x).sum()


class CountingBackend:
    """Counts compilations and calls of what was compiled."""

    def __init__(self) -> None:
        self.num_compiled = 0
        self.num_calls = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.num_compiled += 1

        def call(*args: Any) -> Any:
            self.num_calls += 1
            return graph(*args)

        return call


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    counters.clear()
    yield
    torch._dynamo.reset()
    # Compiling switches the checks of torch.distributions off for good.
    torch.distributions.Distribution.set_default_validate_args(True)


@pytest.fixture
def backend() -> CountingBackend:
    return CountingBackend()


def compiled_in_place(model: Net, **options: Any) -> Net:
    model.compile(**options)
    return model


def compiled_forward(model: Net, **options: Any) -> Net:
    model.forward = torch.compile(model.forward, **options)
    return model


def compiled_part(model: Net, **options: Any) -> Net:
    model.inner = torch.compile(model.inner, **options)
    return model


WAYS: dict[str, tuple[Callable[..., Any], str]] = {
    "module": (torch.compile, "Net"),
    "in place": (compiled_in_place, "Net"),
    "forward": (compiled_forward, "Net"),
    "part": (compiled_part, "Linear"),
}
OPTIONS: list[dict[str, Any]] = [{}, {"fullgraph": True}, {"dynamic": True}]


def facts(hunt: nanhunt.Hunt) -> dict[str, str]:
    return dict(hunt.report().facts)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_is_compiled_once_and_gives_the_same_before_in_and_after_a_trace(
    way: str, options: dict[str, Any], backend: CountingBackend
) -> None:
    make, name = WAYS[way]
    model = make(Net().eval(), backend=backend, **options)
    x_BC = torch.randn(3, 4)
    before = model(x_BC)
    with nanhunt.trace(model) as hunt:
        inside = model(x_BC)
    num_before = backend.num_calls
    after = model(x_BC)
    assert backend.num_compiled == 1
    assert (num_before, backend.num_calls) == (1, 2)
    assert torch.equal(before, inside)
    assert torch.equal(before, after)
    assert facts(hunt)["compiled code"] == f"traced in eager mode: {name}"
    assert not counters["graph_break"]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_model_compiled_and_first_called_in_a_trace_is_compiled_after_it(
    way: str, options: dict[str, Any], backend: CountingBackend
) -> None:
    make, name = WAYS[way]
    with nanhunt.trace() as hunt:
        model = make(Net().eval(), backend=backend, **options)
        x_BC = torch.randn(3, 4)
        inside = model(x_BC)
    assert backend.num_compiled == 0
    after = model(x_BC)
    assert torch.equal(model(x_BC), inside)
    assert torch.equal(after, inside)
    assert (backend.num_compiled, backend.num_calls) == (1, 2)
    assert facts(hunt)["compiled code"] == f"traced in eager mode: {name}"
    assert not counters["graph_break"]


@pytest.mark.parametrize("way", WAYS)
def test_a_fault_in_compiled_code_has_its_own_line_and_module(way: str, backend: CountingBackend) -> None:
    model = WAYS[way][0](Net(), backend=backend)
    with nanhunt.trace(model) as hunt:
        model(torch.randn(3, 4)).sum().backward()
    where = hunt.report().first.location
    assert (where.phase, where.op) == ("forward", "aten::log")
    assert where.source.text == "return h_BC.log() if self.training else h_BC.exp()"


def test_the_report_says_that_faults_of_the_compiled_code_alone_were_not_looked_for(backend: CountingBackend) -> None:
    function = torch.compile(squared, backend=backend)
    with nanhunt.trace() as hunt:
        function(torch.ones(2))
        function(torch.ones(3))
    assert facts(hunt)["compiled code"] == "traced in eager mode: squared"
    (skip,) = hunt.report().skips
    assert skip.what == "looking for faults of the compiled code alone"
    assert "nanhunt.compare_compiled" in skip.reason


def test_a_compiled_callable_without_a_name_goes_by_its_type(backend: CountingBackend) -> None:
    function = torch.compile(functools.partial(torch.add, torch.ones(2)), backend=backend)
    with nanhunt.trace() as hunt:
        function(torch.ones(2))
    assert backend.num_compiled == 0
    assert facts(hunt)["compiled code"] == "traced in eager mode: partial"


def test_a_report_without_compiled_code_says_nothing_of_it() -> None:
    with nanhunt.trace() as hunt:
        squared(torch.ones(2))
    assert "compiled code" not in facts(hunt)
    assert hunt.report().skips == ()


def test_training_compiled_goes_on_as_if_there_had_been_no_trace(backend: CountingBackend) -> None:
    def train(is_traced: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = torch.compile(nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 1)), backend=backend)
        optimizer = torch.optim.Adam(model.parameters())
        losses = []

        def steps(number: int) -> None:
            for _ in range(number):
                optimizer.zero_grad()
                loss = model(torch.randn(5, 4)).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())

        steps(2)
        if is_traced:
            with nanhunt.trace(model, optimizer):
                steps(2)
        else:
            steps(2)
        steps(2)
        return [*losses, *model.parameters()]

    plain = train(False)
    num_compiled = backend.num_compiled
    torch._dynamo.reset()
    traced = train(True)
    assert all(torch.equal(one, other) for one, other in zip(plain, traced, strict=True))
    assert backend.num_compiled == 2 * num_compiled


def test_a_stance_of_the_program_is_kept(backend: CountingBackend) -> None:
    function = torch.compile(squared, backend=backend)
    with torch.compiler.set_stance("eager_on_recompile"):
        before = eval_frame._stance
        with nanhunt.trace():
            function(torch.ones(2))
        assert eval_frame._stance is before
    with nanhunt.trace():
        with torch.compiler.set_stance("fail_on_recompile"):
            function(torch.ones(2))
        torch.compiler.set_stance("eager_on_recompile")
    assert eval_frame._stance.stance == "eager_on_recompile"
    torch.compiler.set_stance("default")


def test_nothing_of_the_trace_stays_after_an_exception() -> None:
    things = (torch.compile, eval_frame._callback_from_stance, eval_frame._stance, nn.Module.__call__)

    def loop() -> None:
        with nanhunt.trace(), nanhunt.trace():
            assert eval_frame._stance.stance == "force_eager"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    left = (torch.compile, eval_frame._callback_from_stance, eval_frame._stance, nn.Module.__call__)
    assert all(one is other for one, other in zip(things, left, strict=True))


def test_overlapping_traces_may_end_in_any_order(backend: CountingBackend) -> None:
    things = (eval_frame._callback_from_stance, eval_frame._stance)
    function = torch.compile(squared, backend=backend, fullgraph=True)
    first, second = AsWritten(facts.__code__), AsWritten(facts.__code__)
    first.__enter__()
    second.__enter__()
    function(torch.ones(2))
    first.__exit__()
    assert eval_frame._stance.stance == "force_eager"
    function(torch.ones(2))
    second.__exit__()
    assert (eval_frame._callback_from_stance, eval_frame._stance) == things
    assert second.names == ["squared"]


def test_compiled_code_of_other_threads_is_not_named(backend: CountingBackend) -> None:
    function = torch.compile(squared, backend=backend)
    results = []
    with nanhunt.trace() as hunt:
        thread = threading.Thread(target=lambda: results.append(function(torch.ones(2))))
        thread.start()
        thread.join()
    assert results == [2]
    assert "compiled code" not in facts(hunt)


def test_a_compiled_function_may_hold_the_trace(backend: CountingBackend) -> None:
    model = torch.compile(Net(), backend=backend)
    hunts = []

    @torch.compile(backend=backend)
    def step(x_BC: Tensor) -> None:
        with nanhunt.trace(model) as hunt:
            model(x_BC).sum().backward()
        hunts.append(hunt)

    step(torch.randn(3, 4))
    step(torch.randn(3, 4))
    assert [hunt.report().first.location.op for hunt in hunts] == ["aten::log", "aten::log"]


def test_compiled_autograd_goes_on_after_a_trace(backend: CountingBackend) -> None:
    model = Net()
    function = torch.compile(model, backend=backend)

    def gradient() -> Tensor:
        model.zero_grad()
        function(torch.ones(3, 4)).exp().sum().backward()
        return model.norm.bias.grad.clone()

    with torch._dynamo.config.patch(compiled_autograd=True):
        before = gradient()
        num_compiled = backend.num_compiled
        with nanhunt.trace(model):
            inside = gradient()
        assert torch.equal(before, inside)
        assert torch.equal(before, gradient())
        assert backend.num_compiled == num_compiled


def test_operations_that_take_functions_pass_through() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def masked(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where(k < q, score, -torch.inf)

    q_BHSC = torch.randn(1, 2, 16, 16)
    with warnings.catch_warnings():
        # Uncompiled, it warns once in a process.
        warnings.simplefilter("ignore")
        expected = flex_attention(q_BHSC, q_BHSC, q_BHSC, score_mod=masked)
    with nanhunt.trace() as hunt:
        found = flex_attention(q_BHSC, q_BHSC, q_BHSC, score_mod=masked)
    assert torch.equal(found, expected)
    assert hunt.report().first is None


PROGRAM = """
    import sys, torch, nanhunt
    from torch import nn

    model, original = nn.Linear(2, 2), torch.compile
    with nanhunt.trace(model):
        model(torch.ones(1, 2)).sum().backward()
    assert "torch._dynamo" not in sys.modules

    with nanhunt.trace(model) as hunt:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(torch.ones(1, 2)).sum().backward()
    assert ("compiled code", "traced in eager mode: Linear") in hunt.report().facts
    assert torch.compile is original
    compiled(torch.ones(1, 2))
"""


def test_the_compiler_is_not_imported_for_a_trace() -> None:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_torch_compiles_by_itself_has_no_name_and_one_line() -> None:
    x = torch.linspace(1, 2, 4).requires_grad_()

    def branched(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: (x - 1).log(), torch.cos, (x,))

    branched(x)[1:].sum().backward()
    expected, x.grad = x.grad, None
    with nanhunt.trace() as hunt:
        branched(x)[1:].sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[1:], expected[1:])
    assert "compiled code" not in facts(hunt)
    with nanhunt.trace(outputs="always") as hunt:
        branched(x).sum().backward()
    where = hunt.report().first.location
    assert (where.op, where.source.text.split("(")[0]) == ("cond", "return torch.cond")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_inside_a_compiled_function_sees_what_is_below() -> None:
    @torch.compile(backend="inductor")
    def step(x: Tensor) -> tuple[Tensor, nanhunt.Hunt]:
        with nanhunt.trace() as hunt:
            y = squared(x - 1)
        return y, hunt

    for _ in range(2):
        _, hunt = step(torch.ones(2))
        assert facts(hunt)["operations"] == "3"
