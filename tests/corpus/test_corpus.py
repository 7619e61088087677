"""The tracer against the corpus, and the corpus against torch without the tracer.

``plain_sightings`` knows nothing of nanhunt: it looks at losses, gradients, parameters, optimizer state, buffers and
module outputs while a loop runs. Every fault must show there, and no look-alike may show where it would do harm.
"""

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import scenario
import torch
from scenario import Loop, Scenario
from score import PHASES, isolated, load_cases, score
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

CASES, UNREADABLE_FILES = load_cases()
HARM = {"loss", "gradient at step", "parameter", "optimizer state"}
"""Where a non-finite value is harm, whatever the loop does next. A GradScaler skips steps, so gradients count late."""


def _params(cases: Iterable[Scenario]) -> list[Any]:
    return [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else []) for case in cases]


FAULTS = _params(case for case in CASES if case.truth is not None)
LOOK_ALIKES = _params(case for case in CASES if case.truth is None)


@pytest.mark.parametrize("case", FAULTS)
def test_fault_is_located(case: Scenario) -> None:
    assert score(case).complaint == ""


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_look_alike_is_silent(case: Scenario) -> None:
    assert score(case).complaint == ""


@pytest.mark.parametrize("case", FAULTS)
def test_fault_is_there_without_the_tracer(case: Scenario) -> None:
    assert plain_sightings(case)


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_look_alike_does_no_harm_without_the_tracer(case: Scenario) -> None:
    assert HARM.isdisjoint(plain_sightings(case))


@pytest.mark.parametrize("case", FAULTS)
def test_marked_line_stands_once_in_the_case(case: Scenario) -> None:
    marked = [text for text in inspect.getsource(case.build).splitlines() if text.rstrip().endswith("# here")]
    assert len(marked) == int(case.truth.has_line)


@pytest.mark.parametrize("case", FAULTS)
def test_truth_uses_the_words_of_a_location(case: Scenario) -> None:
    assert case.truth.phase in PHASES
    ops = case.truth.op or ()
    assert isinstance(ops, tuple)
    assert all("::" in op or op == "" for op in ops)


def test_every_file_can_be_imported() -> None:
    assert [result.complaint for result in UNREADABLE_FILES] == []


def test_names_are_unique() -> None:
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []


def test_every_case_says_where_it_is_known_from() -> None:
    assert [case.name for case in CASES if not case.source.strip()] == []


def test_corpus_is_large_enough() -> None:
    assert len(FAULTS) >= 60
    assert len(LOOK_ALIKES) >= 25


def test_every_phase_has_faults() -> None:
    assert {case.truth.phase for case in CASES if case.truth is not None} == set(PHASES)


def test_plain_look_sees_each_kind_of_harm() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())

    def run() -> None:
        model(torch.full((1, 2), torch.nan)).sum().backward()
        optimizer.step()

    case = Scenario("spoilt", "made up", lambda: Loop(model, run, optimizer), None)
    assert plain_sightings(case) == {*HARM, "module output", "gradient"}


def test_plain_look_sees_nothing_in_a_healthy_loop() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())

    def run() -> None:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    assert plain_sightings(Scenario("healthy", "made up", lambda: Loop(model, run, optimizer), None)) == set()


def plain_sightings(case: Scenario) -> set[str]:
    """Runs the loop without nanhunt; the kinds of places where something non-finite was seen."""
    with isolated():
        loop = case.build()
        seen: set[str] = set()
        try:
            with _watched(seen):
                loop.run()
        except Exception as error:
            if loop.raises is None or not isinstance(error, loop.raises):
                raise
            seen.add("raised")
        else:
            assert loop.raises is None, f"{case.name} was to raise"
        _look_at_what_is_left(seen, loop)
    return seen


def _look_at_what_is_left(seen: set[str], loop: Loop) -> None:
    if loop.model is not None:
        _look(seen, "parameter", loop.model.parameters())
        _look(seen, "buffer", loop.model.buffers())
    if loop.optimizer is not None:
        _look_at_optimizer(seen, loop.optimizer)


@contextlib.contextmanager
def _watched(seen: set[str]) -> Iterator[None]:
    """Looks at losses, gradients, optimizers and the outputs of modules while something runs."""
    handles = [
        nn.modules.module.register_module_forward_hook(lambda _, __, output: _look(seen, "module output", output)),
        register_optimizer_step_pre_hook(lambda optimizer, *_: _look(seen, "gradient at step", _gradients(optimizer))),
        register_optimizer_step_post_hook(lambda optimizer, *_: _look_at_optimizer(seen, optimizer)),
    ]
    backward, grad = torch.autograd.backward, torch.autograd.grad
    try:
        with (
            mock.patch("torch.autograd.backward", _watching_roots(seen, backward)),
            mock.patch("torch.autograd.grad", _watching_roots(seen, grad)),
        ):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _watching_roots(seen: set[str], function: Callable[..., Any]) -> Callable[..., Any]:
    def watching(roots: Any, *args: Any, **kwargs: Any) -> Any:
        _look(seen, "loss", roots)
        leaves = list(_leaves(roots))
        result = function(roots, *args, **kwargs)
        _look(seen, "gradient", [result, *(leaf.grad for leaf in leaves)])
        return result

    return watching


def _leaves(roots: Any) -> Iterator[Tensor]:
    """The tensors into which the backward pass from these roots accumulates."""
    nodes = [root.grad_fn for root in tree_leaves(roots) if isinstance(root, Tensor)]
    known = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [following for following, _ in node.next_functions]


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor | None]:
    return [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]


def _look_at_optimizer(seen: set[str], optimizer: torch.optim.Optimizer) -> None:
    _look(seen, "parameter", [group["params"] for group in optimizer.param_groups])
    _look(seen, "optimizer state", list(optimizer.state.values()))


def _look(seen: set[str], kind: str, values: Any) -> None:
    if torch.compiler.is_compiling():
        return
    with torch.no_grad():
        leaves = tree_leaves(list(values) if isinstance(values, Iterator) else values)
        if any(isinstance(leaf, Tensor) and not _is_finite(leaf) for leaf in leaves):
            seen.add(kind)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; true of what has no values of its own to read."""
    has_values = not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)
    if not has_values or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return bool(torch.isfinite(tensor).all())


def test_files_are_in_the_corpus_folder() -> None:
    assert {Path(case.file).parent for case in CASES} == {Path(scenario.__file__).parent}
