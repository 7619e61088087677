"""Limits and spacings of floating-point types against numpy and torch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanhunt.numerics import LIMITS, count, ulp

NUMPY = {"float16": np.float16, "float32": np.float32, "float64": np.float64}
oracle = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("dtype", NUMPY)
def test_limits_are_those_of_numpy(dtype):
    info = np.finfo(NUMPY[dtype])
    limits = LIMITS[dtype]
    assert limits.max == float(info.max)
    assert limits.tiny == float(info.smallest_normal)
    assert limits.smallest_subnormal == float(info.smallest_subnormal)
    assert limits.eps == float(info.eps)


@pytest.mark.parametrize("dtype", LIMITS)
def test_limits_are_those_of_torch(dtype):
    info = torch.finfo(getattr(torch, dtype))
    limits = LIMITS[dtype]
    assert (limits.max, limits.tiny, limits.eps) == (info.max, info.tiny, info.eps)


def test_the_smallest_bfloat16_is_that_of_torch():
    bits = torch.tensor([1], dtype=torch.int16).view(torch.bfloat16)
    assert LIMITS["bfloat16"].smallest_subnormal == bits.item()


@pytest.mark.parametrize(("dtype", "width"), [("float16", 16), ("float32", 32), ("float64", 64)])
def test_ulp_is_numpy_spacing_at_every_number(dtype, width):
    limits = LIMITS[dtype]

    @oracle
    @given(value=st.floats(width=width, allow_nan=False, allow_infinity=False))
    @example(value=0.0)
    @example(value=limits.tiny)
    @example(value=-limits.tiny)
    @example(value=limits.smallest_subnormal)
    @example(value=1.0)
    @example(value=-1.0)
    @example(value=1.0 - limits.eps / 2)
    def check(value):
        # numpy steps up from the largest number into infinity, and in float16 from -1 towards zero.
        if abs(value) < limits.max:
            assert ulp(value, dtype) == ulp(-value, dtype) == float(np.spacing(NUMPY[dtype](abs(value))))

    check()


def test_ulp_of_bfloat16_is_the_distance_to_the_next_number():
    bits = torch.arange(0, 0x7F7F, dtype=torch.int16)
    values = bits.view(torch.bfloat16).double()
    above = (bits + 1).view(torch.bfloat16).double()
    steps = torch.tensor([ulp(value, "bfloat16") for value in values.tolist()], dtype=torch.float64)
    assert torch.equal(steps, above - values)


@pytest.mark.parametrize("dtype", LIMITS)
def test_ulp_at_the_largest_number_is_the_step_down_from_it(dtype):
    limits = LIMITS[dtype]
    assert ulp(limits.max, dtype) == limits.max * limits.eps / (2 - limits.eps)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", LIMITS)
def test_beyond_the_numbers_there_is_no_spacing(dtype, value):
    assert math.isnan(ulp(value, dtype))


def test_beyond_the_range_of_the_type_there_is_no_spacing():
    assert math.isnan(ulp(65520.0, "float16"))
    assert math.isnan(ulp(-1e39, "float32"))
    assert ulp(65504.0, "float16") == 32.0


def test_an_unknown_type_is_refused():
    with pytest.raises(KeyError):
        ulp(1.0, "int8")


def test_numbers_agree_with_their_nouns():
    assert count(1, "gradient") == "1 gradient"
    assert count(0, "gradient") == "0 gradients"
    assert count(61_440, "logit") == "61,440 logits"
    assert count(1, "matrix", "matrices") == "1 matrix"
    assert count(2, "matrix", "matrices") == "2 matrices"
