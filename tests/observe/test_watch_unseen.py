"""The sentinel leaves no mark on what a loop does with its model, and sees it all the same."""

import contextlib
import copy
import gc
import io
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import nanhunt


class Scaled(nn.Module):
    """A linear layer that hands out its weight as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows @ self.weight, self.weight


class Shifted(nn.Module):
    """Adds a weight, for which autograd saves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.weight


class Views(nn.Module):
    """Gives a view whose base is written to afterwards; or one of several views, which then is of no use."""

    def __init__(self, many: bool) -> None:
        super().__init__()
        self.fc, self.many = nn.Linear(3, 4), many

    def forward(self, rows: Tensor) -> Any:
        hidden = self.fc(rows)
        view = hidden.unbind(0)[0] if self.many else hidden[:, :3]
        hidden += 1
        return (hidden.clone(), view) if self.many else view


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@contextlib.contextmanager
def warns(match: str) -> Iterator[None]:
    with pytest.warns(RuntimeWarning, match=match):
        yield


def calls_kept(watch: nanhunt.Watch) -> list[Any]:
    return nanhunt.read_capture(watch.faults[-1].capture).payload["calls"]


def test_parameter_that_the_model_gives_back_is_hooked_for_the_step_alone(tmp_path: Path):
    model = Scaled()
    optimizer = sgd(model)
    with nanhunt.watch(model, optimizer, out_dir=tmp_path):
        for _ in range(3):
            rows, weight = model(torch.ones(2, 3))
            (rows.sum() + weight.sum()).backward()
            optimizer.step()
            assert not model.weight._backward_hooks
        model(torch.ones(2, 3))
        torch.save(model, io.BytesIO())

    assert not model.weight._backward_hooks


def test_gradient_of_a_parameter_that_the_model_gives_back_is_kept(tmp_path: Path):
    model = Scaled()
    optimizer = sgd(model)
    with (
        nanhunt.watch(model, optimizer, out_dir=tmp_path, on_fault="record") as watch,
        warns("non-finite"),
    ):
        (model(torch.ones(2, 3))[1].sum() * math.inf).backward()
        optimizer.step()

    assert list(calls_kept(watch)[0]["output_grads"]) == ["1"]


def test_hooks_of_a_step_that_the_loop_dropped_are_taken_off(tmp_path: Path):
    model = Scaled()
    optimizer = sgd(model)
    with nanhunt.watch(model, optimizer, out_dir=tmp_path):
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.ones(2, 3))[1].sum().backward()

        assert len(model.weight._backward_hooks) <= 2


def test_gradient_of_a_view_whose_base_was_written_to_is_kept(tmp_path: Path):
    model = Views(many=False)
    optimizer = sgd(model)
    with (
        nanhunt.watch(model, optimizer, out_dir=tmp_path, on_fault="record") as watch,
        warns("non-finite"),
    ):
        (model(torch.ones(2, 3)) * math.inf).sum().backward()
        optimizer.step()

    assert calls_kept(watch)[0]["output_grads"]["0"].tolist() == [[math.inf] * 3] * 2


def test_view_that_autograd_has_given_up_is_passed_over(tmp_path: Path):
    model = Views(many=True)
    optimizer = sgd(model)
    with nanhunt.watch(model, optimizer, out_dir=tmp_path) as watch:
        model(torch.ones(2, 3))[0].sum().backward()
        optimizer.step()

    assert (watch.step, len(watch.faults)) == (1, 0)


def test_output_and_model_can_be_copied_and_saved_without_a_word(tmp_path: Path):
    model = nn.Linear(3, 1)
    optimizer = sgd(model)
    with nanhunt.watch(model, optimizer, out_dir=tmp_path):
        output = model(torch.ones(2, 3))
        for thing in (output, model, optimizer):
            torch.save(thing, io.BytesIO())
        twin = copy.deepcopy(model)
        output.sum().backward()
        optimizer.step()

    assert not output._backward_hooks
    assert not any(len(hooks) for name, hooks in vars(twin).items() if name.endswith("_hooks"))


def test_input_that_the_model_gives_back_can_be_saved_without_a_word(tmp_path: Path):
    model = nn.Sequential(nn.Identity())
    rows = torch.ones(2, 3, requires_grad=True)
    with nanhunt.watch(model, torch.optim.SGD([rows], lr=0.1), out_dir=tmp_path):
        model(rows)
        torch.save(rows, io.BytesIO())

    assert not rows._backward_hooks


def test_input_that_the_output_is_written_into_is_let_go(tmp_path: Path):
    model = Shifted()
    state = torch.ones(2, 3)
    with nanhunt.watch(model, sgd(model), out_dir=tmp_path):
        state.copy_(model(state))
    held = weakref.ref(state)
    del state
    gc.collect()

    assert held() is None


def test_class_of_the_model_is_left_as_it_was(tmp_path: Path):
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 1)))
    with nanhunt.watch(model, sgd(model), out_dir=tmp_path):
        assert "__call__" in vars(nn.Sequential)

    assert "__call__" not in vars(nn.Sequential)


def test_model_that_changes_its_class_is_still_seen(tmp_path: Path):
    model = nn.LazyLinear(2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with nanhunt.watch(model, optimizer, out_dir=tmp_path) as watch:
        seen = []
        for _ in range(3):
            model(torch.ones(2, 3)).sum().backward()
            seen.append(len(watch._kept.calls))
            optimizer.step()

    assert (type(model), seen) == (nn.Linear, [1, 1, 1])
    assert not any("__call__" in vars(kind) for kind in (nn.Linear, nn.LazyLinear))


def test_other_models_of_the_class_are_not_seen(tmp_path: Path):
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)
    with nanhunt.watch(model, sgd(model), out_dir=tmp_path) as watch:
        other(torch.ones(2, 3))
        model(torch.ones(2, 3))

    assert len(watch._kept.calls) == 1


def test_roots_of_a_backward_pass_may_be_an_iterator(tmp_path: Path):
    model = nn.Linear(3, 1)
    with nanhunt.watch(model, sgd(model), out_dir=tmp_path) as watch:
        torch.autograd.backward(iter([model(torch.ones(2, 3)).sum(), model(torch.ones(2, 3)).sum()]))

    assert model.bias.grad.tolist() == [4.0]
    assert len(watch._kept.losses) == 2


def test_root_of_a_backward_pass_may_be_an_edge_of_the_graph(tmp_path: Path):
    model = nn.Linear(3, 1)
    with nanhunt.watch(model, sgd(model), out_dir=tmp_path):
        loss = model(torch.ones(2, 3)).sum()
        torch.autograd.backward(torch.autograd.graph.get_gradient_edge(loss))

    assert model.bias.grad.tolist() == [2.0]


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_faulty", [False, True])
def test_modes_of_the_loop_see_nothing_of_it(is_faulty: bool, tmp_path: Path):
    def names(watched: bool) -> list[str]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        optimizer = sgd(model)
        watch = nanhunt.watch(model, optimizer, out_dir=tmp_path, on_fault="record")
        if watched:
            watch.__enter__()
        with _Names() as mode:
            (model(torch.ones(2, 3)).sum() * (math.inf if is_faulty else 1.0)).backward()
            optimizer.step()
        watch.__exit__(None, None, None)
        return mode.names

    if is_faulty:
        with warns("non-finite"):
            assert names(watched=True) == names(watched=False)
    else:
        assert names(watched=True) == names(watched=False)


def test_buffer_of_inference_mode_is_no_hindrance_to_a_skip(tmp_path: Path):
    model = nn.Linear(3, 1)
    with torch.inference_mode():
        model.register_buffer("scale", torch.ones(1))
    optimizer = sgd(model)
    with (
        nanhunt.watch(model, optimizer, out_dir=tmp_path, on_fault="skip") as watch,
        warns("skipped"),
    ):
        (model(torch.ones(2, 3)).sum() * math.inf).backward()
        optimizer.step()

    assert watch.faults[0].problem == ""


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_a_traced_loop_dropped_are_seen_to_be_gone(set_to_none: bool, tmp_path: Path):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)

    def loader(watch: nanhunt.Watch) -> Iterator[Tensor]:
        return watch.batches(torch.full((2, 3), float(number)) for number in range(3))

    with (
        nanhunt.trace(model, optimizer),
        nanhunt.watch(model, optimizer, out_dir=tmp_path, on_fault="skip") as watch,
        warns("skipped"),
    ):
        for number, rows in enumerate(loader(watch)):
            optimizer.zero_grad(set_to_none=set_to_none)
            (model(rows).sum() * (math.inf if number == 2 else 1.0)).backward()
        optimizer.step()

    assert [float(rows[0, 0]) for rows in nanhunt.read_capture(watch.faults[0].capture).batches] == [2.0]


class _Graphs:
    """A compiler that compiles nothing and counts."""

    def __init__(self) -> None:
        self.num = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.num += 1
        return graph


def _outside(model: nn.Module, backend: Any) -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def _in_place(model: nn.Module, backend: Any) -> Any:
    model.compile(backend=backend, fullgraph=True)
    return model


def _inner(model: nn.Module, backend: Any) -> Any:
    model.inner.compile(backend=backend, fullgraph=True)
    return model


class Nested(nn.Module):
    """A module that holds another of its class."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.fc, self.inner = nn.Linear(3, 3), inner

    def forward(self, rows: Tensor) -> Tensor:
        return self.inner(self.fc(rows).tanh())


# The compiler looks at inputs that are no leaves, and warns of itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled", [_outside, _in_place, _inner])
@pytest.mark.parametrize("is_late", [False, True])
def test_compiled_model_is_compiled_once_and_seen(compiled: Any, is_late: bool, tmp_path: Path):
    torch.compiler.reset()
    graphs = _Graphs()
    model = compiled(Nested(Nested(nn.Linear(3, 1))), graphs)
    optimizer = sgd(model)
    rows = torch.ones(2, 3)
    if is_late:
        model(rows)

    with nanhunt.watch(model, optimizer, out_dir=tmp_path) as watch:
        for _ in range(2):
            model(rows).sum().backward()
            num_seen = len(watch._kept.calls)
            optimizer.step()
    model(rows)

    assert (num_seen, watch.step) == (1, 2)
    # What was compiled while a stand-in was on a class that it calls is compiled anew without it.
    assert graphs.num == 1 if is_late else graphs.num <= 2


def test_model_in_a_compiled_function_is_compiled_with_it(tmp_path: Path):
    torch.compiler.reset()
    graphs, model, rows = _Graphs(), nn.Linear(3, 1), torch.ones(2, 3)
    compiled = torch.compile(lambda rows: model(rows).sum(), backend=graphs, fullgraph=True)
    with nanhunt.watch(model, sgd(model), out_dir=tmp_path):
        compiled(rows).backward()

    assert graphs.num == 1
    assert model.bias.grad.tolist() == [2.0]


def test_model_compiled_within_the_watch_is_compiled_and_seen(tmp_path: Path):
    torch.compiler.reset()
    graphs, model, rows = _Graphs(), Nested(nn.Linear(3, 1)), torch.ones(2, 3)
    with nanhunt.watch(model, sgd(model), out_dir=tmp_path) as watch:
        compiled = torch.compile(model, backend=graphs, fullgraph=True)
        compiled(rows).sum().backward()
    compiled(rows)

    assert (graphs.num, len(watch._kept.calls)) == (1, 1)
