"""Comparing with float64: what counts as which error."""

import math

import pytest
import torch

from nanhunt.audit.dtype_looks import batch_tensor, narrowing
from nanhunt.audit.shadow import compared
from nanhunt.records.dtype_audit import OpPlace

PLACE = OpPlace("aten::_to_copy")


def half(*values):
    return torch.tensor(values, dtype=torch.float16)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_relative_errors_are_those_of_elements():
    error = compared(half(1.0, 2.0, 5.0), double(1.0, 2.5, 4.0))
    assert (error.max_relative, error.median_relative, error.num_beyond) == (0.25, 0.2, 2)
    assert error.norm_relative == pytest.approx(math.sqrt(1.25) / math.sqrt(1 + 6.25 + 16))


def test_rounding_alone_is_beyond_nothing():
    exact = torch.linspace(1, 2, 1000, dtype=torch.float64)
    error = compared(exact.half(), exact)
    assert error.num_beyond == 0
    assert error.max_relative <= 2.0**-11


def test_overflow_is_where_float64_is_finite():
    error = compared(half(math.inf, -math.inf, math.nan, math.inf), double(1e5, -1e5, 1.0, math.inf))
    assert (error.num_overflow, error.num_negative_overflow, error.num_nan, error.largest) == (2, 1, 1, 1e5)


def test_zero_counts_where_float64_would_not_round_to_it():
    assert compared(half(0.0, 0.0, 0.0), double(1e-3, 1e-12, 0.0)).num_to_zero == 1


def test_subnormal_results_are_beyond_nothing():
    assert compared(half(6e-8), double(8e-8)).num_beyond == 0


def test_the_error_of_a_sum_is_beside_the_magnitudes():
    assert compared(half(0.5), double(0.25), double(1000.0)).norm_relative == 0.25 / 1000


@pytest.mark.parametrize(("result", "shadow"), [(half(), double()), (half(1.0), double(1.0, 2.0))])
def test_nothing_to_compare_is_none(result, shadow):
    assert compared(result, shadow) is None


def test_complex_numbers_are_compared_as_such():
    error = compared(torch.tensor([1 + 1j], dtype=torch.complex64), torch.tensor([1 + 2j], dtype=torch.complex128))
    assert error.max_relative == pytest.approx(1 / math.sqrt(5))


def test_a_sample_is_lost_where_underflow_takes_more_than_a_hundredth():
    before = torch.tensor([[1.0, 1e-9], [1e-9, 1e-9], [0.0, 0.0]])
    found = narrowing(PLACE, before, before.half(), "batch.labels")
    assert (found.num_nonzero, found.num_to_zero) == (4, 3)
    assert (found.num_samples, found.num_samples_lost) == (2, 1)


@pytest.mark.parametrize(
    ("values", "is_mask"), [((1.0, -1e9, -1e9), True), ((1.0, 1e9, 1e9), False), ((1.0, -1e9, -2e9), False)]
)
def test_a_mask_is_one_negative_number(values, is_mask):
    before = torch.tensor(values)
    found = narrowing(PLACE, before, before.half(), "")
    assert (found.num_overflow, found.is_mask) == (2, is_mask)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float16])
def test_what_is_beyond_the_range_has_overflowed_whatever_stands_for_it(dtype):
    before = torch.tensor([1.0, 1e6])
    assert narrowing(PLACE, before, before.to(dtype), "").num_overflow == 1


def test_what_rounds_to_the_largest_number_has_not():
    before = torch.tensor([65504.0, 65510.0])
    assert narrowing(PLACE, before, before.half(), "").num_overflow == 0


def test_what_was_infinite_before_has_not_overflowed():
    before = torch.tensor([1.0, math.inf, math.nan])
    found = narrowing(PLACE, before, before.half(), "")
    assert (found.num_overflow, found.largest) == (0, 1.0)


def test_a_constant_has_no_spread():
    before = torch.full((4,), 0.1)
    assert narrowing(PLACE, before, before.half(), "").spread_error == 0.0
    assert narrowing(PLACE, torch.tensor(0.1), torch.tensor(0.1).half(), "").num_samples == 1


def test_subnormal_numbers_are_counted_without_zero():
    found = batch_tensor("batch.w", half(0.0, 6e-8, 1e-5, 1.0))
    assert (found.num_nonzero, found.num_subnormal) == (3, 2)
    assert found.smallest == pytest.approx(5.96e-8, rel=1e-3)
