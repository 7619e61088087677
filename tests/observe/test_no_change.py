"""The probes change nothing: loss, gradients, weights and random numbers are the same with and without them."""

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import nanhunt
from nanhunt.observe.exact import ExactTracer
from nanhunt.observe.modules import ModuleTracer

Seen = list[Any]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3))
        self.head = nn.Linear(8, 1)

    def forward(self, rows: Tensor) -> Tensor:
        jitter = random.random() + float(np.random.rand())  # noqa: NPY002 - the global generator is what is tested
        return self.head(self.layers(rows)) * jitter


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 1)

    def forward(self, rows: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(rows.shape[0])
        return self.head(self.encoder(self.embed(rows)[None], mask=causal))


@contextlib.contextmanager
def exact(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path):
    tracer = ExactTracer(model)
    tracer.declare("parameter", model.named_parameters())
    tracer.declare("buffer", model.named_buffers())
    with tracer:
        yield
        tracer.reached("gradient", [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None])
        tracer.reached("parameter", [(name, p.detach()) for name, p in model.named_parameters()])
    assert tracer.trace.problems == ()
    assert tracer.trace.first_offender is None


@contextlib.contextmanager
def focused(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path):
    # An operation that is never reached: the steps are not ended early.
    with ExactTracer(model, focus=[*range(200), 10**9]):
        yield


def modules(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Any:
    return ModuleTracer(model)


def watch(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Any:
    return nanhunt.watch(model, optimizer, out_dir=folder)


def watch_modules(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Any:
    return nanhunt.watch(model, optimizer, out_dir=folder, trace_finite=True)


PROBES = {probe.__name__: probe for probe in (exact, focused, modules, watch, watch_modules)}


def run(build: Callable[[], nn.Module], probe: Any, folder: Path, *, num_steps: int = 3) -> Seen:
    """Losses, gradients, weights, buffers, moments and the states of the generators after some steps."""
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global generator is what is tested
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen: Seen = []
    with probe(model, optimizer, folder) if probe else contextlib.nullcontext():
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss = model(torch.randn(6, 5)).square().mean()
            loss.backward()
            seen += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    seen += [*model.state_dict().values()]
    seen += [value for state in optimizer.state.values() for value in state.values()]
    return [*seen, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002


def same(ours: Seen, theirs: Seen) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("build", [Small, Transformer])
@pytest.mark.parametrize("probe", PROBES)
def test_probe_leaves_every_bit_of_the_steps_as_it_is(probe: str, build: Callable[[], nn.Module], tmp_path: Path):
    assert same(run(build, PROBES[probe], tmp_path), run(build, None, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_comparison_can_fail(tmp_path: Path):
    @contextlib.contextmanager
    def drawing(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path):
        random.random()
        yield

    assert not same(run(Small, drawing, tmp_path), run(Small, None, tmp_path))


@pytest.mark.parametrize("on_fault", ["skip", "record"])
def test_a_fault_draws_no_random_numbers(on_fault: str, tmp_path: Path):
    def states(probe: Any) -> Seen:
        torch.manual_seed(5)
        random.seed(5)
        model = Small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with probe(model, optimizer) if probe else contextlib.nullcontext():
            (model(torch.randn(6, 5)).sum() * torch.inf).backward()
            optimizer.step()
        return [torch.get_rng_state(), random.getstate()]

    with pytest.warns(RuntimeWarning, match="non-finite"):
        watched = states(lambda m, o: nanhunt.watch(m, o, out_dir=tmp_path, on_fault=on_fault))
    assert same(watched, states(None))


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("probe", PROBES)
def test_hooks_and_patches_are_gone_afterwards(probe: str, raises: bool, tmp_path: Path):
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward = torch.autograd.backward

    with contextlib.suppress(ZeroDivisionError), PROBES[probe](model, optimizer, tmp_path):
        model(torch.randn(6, 5)).sum().backward()
        optimizer.step()
        if raises:
            raise ZeroDivisionError

    assert torch.autograd.backward is backward
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_watch_inside_a_watch_puts_backward_back(tmp_path: Path):
    backward = torch.autograd.backward
    first, second = Small(), Small()

    with (
        watch(first, torch.optim.SGD(first.parameters()), tmp_path),
        watch(second, torch.optim.SGD(second.parameters()), tmp_path),
    ):
        (first(torch.randn(6, 5)) + second(torch.randn(6, 5))).sum().backward()

    assert torch.autograd.backward is backward
