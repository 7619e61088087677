"""The one look the sentinel takes at every step: no false alarm, and nothing non-finite passes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanhunt.observe import finite
from nanhunt.observe.finite import all_finite

NAN, INF = math.nan, math.inf
SMALL, LARGE = 7, 40_000
USUAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def with_one(value: float, size: int, dtype: torch.dtype, position: int) -> Tensor:
    tensor = torch.ones(size, dtype=dtype)
    tensor[position] = value
    return tensor


@pytest.mark.parametrize("dtype", USUAL)
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("position", [0, -1])
def test_one_bad_element_among_many_tensors_is_seen(dtype: torch.dtype, size: int, value: float, position: int):
    good = [torch.ones(SMALL), torch.ones(LARGE), torch.ones(3, dtype=dtype)]

    assert all_finite([*good, torch.ones(size, dtype=dtype)])
    assert not all_finite([*good, with_one(value, size, dtype, position)])
    assert not all_finite([with_one(value, size, dtype, position)])


def test_infinities_that_cancel_are_seen():
    assert not all_finite([torch.tensor([INF]), torch.tensor([-INF])])


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_half_precision_whose_sum_overflows_is_finite_at_one_look(size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(finite, "sums", lambda tensors: pytest.fail("looked twice"))

    assert all_finite([torch.full((size,), 6e4, dtype=torch.float16), torch.ones(3)])
    assert all_finite([torch.full((size,), 6e4, dtype=torch.float16)])


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_values_whose_sum_overflows_in_full_precision_are_finite(size: int):
    assert all_finite([torch.full((size,), 3e38)])
    assert all_finite([torch.full((size,), 1e308, dtype=torch.float64), torch.ones(3)])


def sparse(value: float) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([1.0, value]), (4,), check_invariants=True)


UNUSUAL: dict[str, Any] = {
    "sparse": sparse,
    "complex": lambda value: torch.tensor([1.0, complex(0.0, value)]),
    "float8": lambda value: torch.tensor([1.0, value]).to(torch.float8_e5m2),
    "a parameter": lambda value: nn.Parameter(torch.tensor([1.0, value])),
    "not contiguous": lambda value: torch.tensor([[1.0, 2.0], [value, 3.0]]).t()[:, 1:],
    "scalar": torch.tensor,
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("others", [[], [torch.ones(SMALL)], [torch.ones(LARGE)]], ids=["alone", "small", "large"])
def test_unusual_tensors_are_judged_too(kind: str, others: list[Tensor]):
    with torch.no_grad():
        assert all_finite([*others, UNUSUAL[kind](2.0)])
        assert not all_finite([*others, UNUSUAL[kind](NAN)])


@pytest.mark.parametrize("others", [[], [torch.ones(SMALL)]], ids=["alone", "with others"])
def test_what_has_no_values_to_read_is_passed_over(others: list[Tensor]):
    for nothing in (torch.empty(3, device="meta"), torch.empty(0), torch._efficientzerotensor((3,))):
        assert all_finite([*others, nothing])
        assert not all_finite([*others, nothing, torch.tensor([NAN])])


def test_no_tensor_at_all_is_finite():
    assert all_finite([])


def test_tensors_are_left_as_they_are():
    tensors = [torch.ones(SMALL), torch.ones(LARGE)]
    all_finite(tensors)
    assert [tensor._version for tensor in tensors] == [0, 0]
