"""Evidence is gathered without calling the hooks that stand between autograd and what it saved."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import nanhunt
from nanhunt.observe.saved import saved

LossOf = Callable[[Tensor], Tensor]

LOSSES: dict[str, LossOf] = {
    "sqrt at 0": lambda x: x.clamp(min=0).sqrt().sum(),
    "log of a clamped number": lambda x: (x.half().clamp(min=1e-9) * 0).log().sum(),
    "division by a product": lambda x: (1 / (x * x)).sum(),
    "where over a root": lambda x: torch.where(x > 0, x.sqrt(), 0.0).sum(),
    "eigenvectors of a tie": lambda x: torch.linalg.eigh(torch.diag(x * 0)).eigenvectors[0].sum(),
}


def unpacked(loss_of: LossOf, *, traced: bool) -> list[tuple[int, ...]]:
    """Shapes of what the hooks unpacked, in order, in a step that goes non-finite."""
    shapes: list[tuple[int, ...]] = []

    def unpack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.tensor([0.0, 1.0, 2.0])))

    def step() -> None:
        with saved_tensors_hooks(lambda tensor: tensor, unpack):
            loss = loss_of(model(torch.ones(3)))
        loss.backward()

    if not traced:
        step()
        return shapes
    with nanhunt.trace(model) as hunt:
        step()
    assert hunt.report().first is not None
    return shapes


@pytest.mark.parametrize("name", LOSSES)
def test_hooks_are_called_as_often_as_without_the_tracer(name: str):
    assert unpacked(LOSSES[name], traced=True) == unpacked(LOSSES[name], traced=False)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_checkpointed_fault_is_found_and_ends_as_it_does_without_the_tracer(name: str, use_reentrant: bool):
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.tensor([0.0, 1.0, 2.0])))

    with nanhunt.trace(model) as hunt:
        h = model(torch.ones(3))
        checkpoint(LOSSES[name], h, use_reentrant=use_reentrant).backward()

    report = hunt.report()
    assert report.first is not None
    assert [skip for skip in report.skips if skip.what == "looking at an operation"] == []


def test_what_no_hook_guards_is_read():
    x = torch.tensor([4.0], requires_grad=True)
    node = x.sqrt().grad_fn

    assert saved(node, "result").tolist() == [2.0]
    assert saved(node, "nothing") is None


def test_what_a_hook_guards_is_not_read():
    x = torch.tensor([4.0], requires_grad=True)
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: pytest.fail("unpacked")):
        node = x.sqrt().grad_fn

    assert saved(node, "result") is None


def test_what_is_freed_is_said_to_be():
    x = torch.tensor([4.0], requires_grad=True)
    y = x.sqrt()
    node = y.grad_fn
    y.backward()

    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        saved(node, "result")
