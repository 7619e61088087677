"""Causes of faults of the backward pass: where the infinity is of the forward pass, and what a finding says beside."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nanhunt
from nanhunt.rules.nh219_half_precision_gradient_overflow import overflow_case
from nanhunt.rules.registry import judge

LossOf = Callable[[Tensor], Tensor]


def trained(values: Any, loss_of: LossOf, dtype: torch.dtype = torch.float32, num_parts: int = 1) -> Any:
    """The first finding of a step of training."""
    model = nn.ParameterDict({"x": nn.Parameter(torch.tensor(values, dtype=dtype))})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    with nanhunt.trace(model, optimizer=optimizer) as hunt:
        for _ in range(num_parts):
            loss_of(model["x"]).backward()
        optimizer.step()
    return hunt.report().first


# An infinity of the forward pass that only the backward pass meets again.

DROPPED: Sequence[tuple[str, str, Any, LossOf]] = [
    ("reciprocal is infinite for 1 element that where", "1 / x", [0, 2.0], lambda x: torch.where(x > 0, 1 / x, 0.0)),
    ("reciprocal is infinite for 2 elements that where", "all", [0, 0.0], lambda x: torch.where(x > 0, 1 / x, 0.0)),
    ("rsqrt is infinite for 1 element that where", "rsqrt", [0, 2.0], lambda x: torch.where(x > 0, x.rsqrt(), 0.0)),
    ("exp is infinite for 1 element that where", "exp", [100, 2.0], lambda x: torch.where(x < 80, x.exp(), 0.0)),
    ("log is infinite for 1 element that where", "p log p", [0, 0.5], lambda x: torch.where(x > 0, x * x.log(), 0.0)),
    ("reciprocal is infinite for 1 element that indexing", "an index", [0, 2.0], lambda x: (1 / x)[x > 0]),
]


@pytest.mark.parametrize(("says", "values", "dropped"), [(case[0], *case[2:]) for case in DROPPED])
def test_infinity_that_the_forward_pass_drops_is_an_untaken_branch(says: str, values: Any, dropped: LossOf):
    first = trained(values, lambda x: dropped(x).sum())

    assert (first.code, first.cause, first.location.phase) == ("NH208", "untaken-branch-gradient", "forward")
    assert says in first.message


KEPT: Sequence[tuple[str, Any, LossOf]] = [
    ("NH103", [0, 2.0], lambda x: 1 / x),
    ("NH103", [0, 2.0], lambda x: (1 / x).clamp(max=5.0)),
    ("NH103", [0, 2.0], lambda x: (1 / x).tanh()),
    ("NH107", [100, 2.0], lambda x: x.exp()),
]


@pytest.mark.parametrize(("code", "values", "kept"), KEPT)
def test_infinity_that_is_used_or_bounded_is_no_untaken_branch(code: str, values: Any, kept: LossOf):
    assert trained(values, lambda x: kept(x).sum()).code == code


def test_infinity_that_is_taken_as_well_as_dropped_is_no_untaken_branch():
    def loss(x: Tensor) -> Tensor:
        slopes = 1 / x
        return torch.where(x > 0, slopes, 0.0).sum() + slopes.sum()

    assert trained([0, 2.0], loss).code == "NH103"


# Powers.


def test_mask_on_a_power_of_a_negative_base_is_said_not_to_help():
    base = torch.tensor([-2.0, 3.0])
    first = trained([2.0, 2.0], lambda p: torch.where(base > 0, base**p, 0.0).sum())

    assert first.code == "NH222"
    assert first.notes == ("where leaves these elements out, which does not help: 0 times NaN is NaN",)


ROOTS: Sequence[tuple[str, LossOf]] = [
    ("NH202", lambda x: (x**2 + 1e-8).sqrt().float().sum()),
    ("NH209", lambda x: ((x**2 + 1e-8) ** 0.5).float().sum()),
]


@pytest.mark.parametrize(("code", "loss_of"), ROOTS)
def test_constant_that_is_zero_in_half_is_named_below_a_root(code: str, loss_of: LossOf):
    first = trained([0.0, 1.0], loss_of, torch.half)

    assert first.code == code
    assert first.notes == ("the 1e-08 in this line is 0 in float16, as anything below 2.98e-08 is",)
    assert "one that is not 0 in" in first.help[0]


def test_no_constant_is_named_where_none_is_written():
    assert trained([0.0, 1.0], lambda x: x.sqrt().float().sum(), torch.half).notes == ()


def test_constant_in_float32_is_no_matter_of_the_type():
    assert trained([0.0, 1.0], lambda x: x.sqrt().sum()).notes == ()


# Sums of gradients.


def test_accumulation_beyond_float16_is_named_with_what_was_added():
    first = trained([1.0, 1.0], lambda x: (x.float() * 30000).sum(), torch.half, num_parts=3)

    assert (first.code, first.location.tensor, first.evidence["added"]) == ("NH219", "x", 30000.0)
    assert first.message.startswith("a gradient of 30000, added to what earlier backward passes had left, went beyond")
    assert first.notes == ("what they had left came to 35504 or more in magnitude",)
    assert first.help[0].startswith("call zero_grad before each step")


def test_sum_of_branches_beyond_float16_is_no_accumulation():
    first = trained([1.0], lambda x: x.float().sum() * 40000 + (x * 1).float().sum() * 40000, torch.half)

    assert (first.code, first.evidence["exact"]) == ("NH219", 80000.0)
    assert "added to what" not in first.message


def test_sum_in_place_that_is_no_parameters_is_no_accumulation():
    finding = judge(overflow_case("add_", "float16", 40000.0, 40000.0))

    assert finding.message.startswith("aten::add_ (backward of aten::mul) went beyond the 65504")
    assert finding.notes == ("all of its inputs were finite",)


class Filled(torch.autograd.Function):
    """Its backward writes into memory of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        made = torch.full_like(gradient, math.nan)
        made[torch.tensor([0])] = gradient[:1]
        return made


def test_write_into_memory_of_the_users_is_no_overflow():
    first = trained([1.0, 2.0], lambda x: Filled.apply(x).sum())

    assert first.cause not in ("gradient-overflow", "half-precision-gradient-overflow")
    assert "all of its inputs were finite" not in first.notes


# What is said of where it was, and of what to do.


def test_hook_on_an_activation_names_no_parameter():
    def loss(x: Tensor) -> Tensor:
        doubled = x * 2
        doubled.register_hook(lambda gradient: gradient / gradient.sub(1).norm())
        return doubled.sum()

    first = trained([1.0, 2.0], loss)

    assert (first.code, first.location.tensor) == ("NH229", "")


def test_hook_on_a_parameter_names_it():
    model = nn.Linear(2, 1, bias=False)
    model.weight.register_hook(lambda gradient: gradient / gradient.norm())
    with nanhunt.trace(model) as hunt:
        model(torch.zeros(1, 2)).sum().backward()
    first = hunt.report().first

    assert (first.code, first.location.tensor) == ("NH229", "weight")


@pytest.mark.parametrize(
    ("function", "value", "says"),
    [
        (torch.acos, 1.0, "atan2, or clamp the argument to a little less than 1 in magnitude"),
        (torch.asin, -1.0, "atan2, or clamp the argument to a little less than 1 in magnitude"),
        (torch.acosh, 1.0, "clamp the argument to a little more than 1 before"),
        (torch.atanh, 1.0, "keep what went into the tanh"),
    ],
)
def test_remedy_keeps_the_argument_in_the_domain(function: LossOf, value: float, says: str):
    first = trained([value], lambda x: function(x).tanh().sum())

    assert first.code == "NH210"
    assert says in first.help[0]
    assert ("atan2" in first.help[0]) == (function in (torch.acos, torch.asin))


@pytest.mark.parametrize(("function", "says"), [(torch.log, "logits"), (torch.rsqrt, "norm layer")])
def test_remedy_of_an_overflowing_slope_fits_the_function(function: LossOf, says: str):
    first = trained([1e-40], lambda x: function(x).sum() if function is torch.log else function(x * 1e10).sum())

    assert first.code == "NH212"
    assert says in first.help[0]


def test_rows_are_mentioned_only_where_some_carry_more_than_their_share():
    def first(values: Any) -> Any:
        return trained(values, lambda x: torch.linalg.eigh(x).eigenvectors.sum())

    whole, part = first([[1.0, 0.0], [0.0, 1.0]]), first([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    assert (whole.code, part.code) == ("NH203", "NH203")
    assert not any("rows" in note for note in whole.notes)
    assert any("rows named" in note for note in part.notes)
