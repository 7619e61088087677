"""A substitution changes the calls of one function on one line, and no others."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nanhunt.experiments.substitute import Substitution, tensors_mapped
from nanhunt.records.ops import SourceLine

ROWS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def changed(op: str, function: Callable[[], Any]) -> Any:
    """What the function's own line gives with the outputs of the operation made 0."""
    line = SourceLine(__file__, inspect.getsourcelines(function)[1])
    with Substitution(line, op, outputs=tensors_mapped(torch.zeros_like)):
        return function()


CALLS: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "method": ("aten::sqrt", lambda: ROWS.sqrt()),
    "in place": ("aten::sqrt_", lambda: ROWS.clone().sqrt_()),
    "operator": ("aten::div", lambda: ROWS / 2),
    "reflected operator": ("aten::reciprocal", lambda: 2 / ROWS),
    "reflected difference": ("aten::rsub", lambda: 1 - ROWS),
    "in-place operator": ("aten::div_", lambda: ROWS.clone().__itruediv__(2)),
    "function of another name": ("aten::linalg_vector_norm", lambda: ROWS.norm()),
    "private operation": ("aten::_softmax", lambda: torch.softmax(ROWS, -1)),
    "native operation": ("aten::native_layer_norm", lambda: torch.layer_norm(ROWS, (2,))),
    "decomposition": ("aten::_linalg_eigh", lambda: torch.linalg.eigh(ROWS).eigenvectors),
    "with error codes": ("aten::linalg_cholesky_ex", lambda: torch.linalg.cholesky(ROWS @ ROWS.mT + torch.eye(2))),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_is_found_however_it_is_written(name: str):
    op, function = CALLS[name]

    assert bool(function().any())
    assert not bool(changed(op, function).any())


NAMESAKES: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "expand": ("aten::exp", lambda: ROWS.expand(2, 2)),
    "logsumexp": ("aten::exp", lambda: ROWS.logsumexp(-1)),
    "matmul": ("aten::mul", lambda: ROWS @ ROWS),
    "cumsum": ("aten::sum", lambda: ROWS.cumsum(0)),
}


@pytest.mark.parametrize("name", NAMESAKES)
def test_call_whose_name_only_holds_the_other_is_left_alone(name: str):
    op, function = NAMESAKES[name]

    with pytest.raises(LookupError, match=r"no call of .* was found at line"):
        changed(op, function)


def test_call_on_another_line_is_left_alone():
    here = SourceLine(__file__, inspect.getsourcelines(test_call_on_another_line_is_left_alone)[1])

    with pytest.raises(LookupError), Substitution(here, "aten::sqrt", outputs=tensors_mapped(torch.zeros_like)):
        assert bool(ROWS.sqrt().any())
