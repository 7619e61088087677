"""What a finding of the forward pass says of its values: at the first element, of what made them, and what to try."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_forward_causes import HALF, finding
from torch import Tensor

from nanhunt.observe.op_info import FocusedOp
from nanhunt.observe.producers import producers
from nanhunt.observe.recomputed import recomputed

F32 = torch.float32
NARROW = "float32 ends at 3.40282e+38"


# The value is that of the first element


@pytest.mark.parametrize(
    ("loss", "values", "words"),
    [
        (
            lambda x: (x * torch.tensor([1e9, 1.0, 1e30])).sum(),
            (1e30, 1.0, 1e30),
            f"aten::mul comes to 1e+39 at [0], the first of 2 elements, up to 1e+60; {NARROW}",
        ),
        (
            lambda x: (torch.full((100,), 10.0) ** torch.arange(1.0, 101.0) * x).sum(),
            (1.0,),
            f"aten::pow comes to 1e+39 at [38], the first of 62 elements, up to 1e+46 among the first 8; {NARROW}",
        ),
        (lambda x: x.log().sum(), (0.0, 1.0, -5.0), "log of 0 at [0], the first of 2 elements, down to -5"),
        (lambda x: x.log().sum(), (0.0, 1.0, 0.0), "log of 0 at 2 elements, first at [0]"),
        (lambda x: x.sqrt().sum(), (-1.0, 4.0, -9.0), "sqrt of -1 at [0], the first of 2 elements, down to -9"),
        (
            lambda x: x.erfinv().sum(),
            (-1.0, 1.0, 0.5),
            "erfinv of -1 at [0], the first of 2 elements, up to 1; its domain is between -1 and 1",
        ),
        (
            lambda x: (x**0.5 * x**1.5).sum(),
            (-2.0, -3.0, 1.0),
            "-2 to the power of 0.5 at [0], the first of 2 elements; a negative number has no such power",
        ),
        (
            lambda x: x.exp().sum(),
            (90.0, 100.0, 1.0),
            "exp of 90 at [0], the first of 2 elements, up to 100; float32 holds exp up to 88.7228",
        ),
    ],
)
def test_the_value_is_that_of_the_first_element(loss, values, words):
    assert finding(loss, *values).message == words


def test_a_value_and_a_limit_that_look_alike_get_more_digits():
    found = finding(lambda x: (x * 4).sum(), 2.0**126)
    assert found.message == "aten::mul comes to 3.402824e+38 at 1 element, first at [0]; float32 ends at 3.402823e+38"


def test_an_edge_that_was_rounded_up_is_not_called_within_reach():
    assert finding(lambda x: x.exp2().sum(), 200.0).message.endswith("; float32 holds exp2 below 128")
    assert torch.tensor(128.0).exp2().isinf()


# What made the values


@pytest.mark.parametrize(
    ("move", "shape", "place"),
    [
        (lambda y: y[:, :1].expand(2, 5), (2, 5), (1, 4)),
        (lambda y: y.view(3, 2), (3, 2), (2, 0)),
        (lambda y: y.t().reshape(6), (6,), (4,)),
        (lambda y: y.unsqueeze(-1), (2, 3, 1), (1, 2, 0)),
        (lambda y: y[:, 1:2].squeeze(1), (2,), (1,)),
        (lambda y: y.mT, (3, 2), (1, 1)),
        (lambda y: y[None].permute(2, 0, 1), (3, 1, 2), (2, 0, 1)),
        (lambda y: y[..., -1], (2,), (1,)),
        (lambda y: y.gather(1, torch.tensor([[2], [1]])), (2, 1), (1, 0)),
        (lambda y: y.flatten()[::2], (3,), (2,)),
    ],
)
def test_a_moved_element_is_followed_to_where_it_was_made(move, shape, place):
    x = torch.tensor([[0.5, 0.25, 0.125], [2.0, 4.0, 8.0]], requires_grad=True)
    moved = move(9.0 - x.square())
    difference, *_ = producers(moved, place, shape)
    (term,) = [value for name, value, _ in difference.numbers if name == "term"]
    assert moved.shape == shape
    assert (difference.op, 9.0 - term) == ("rsub", moved[place])


@pytest.mark.parametrize(
    ("loss", "eps"),
    [
        (lambda x: F.normalize(x[:, None], dim=-1).float().sum(), 1e-12),
        (lambda x: (x / (x.detach().abs() + 1e-8)).float().sum(), 1e-8),
        (lambda x: (x + 1e-8).log().float().sum(), 1e-8),
        (lambda x: (-torch.log(x.detach() + 1e-9) * x).float().sum(), 1e-9),
    ],
)
def test_an_eps_that_is_0_in_half_is_named(loss, eps):
    found = finding(loss, 1.0, 0.0, dtype=HALF)
    assert found.cause == "half-precision-underflow"
    assert f"{eps:g}, which is 0 in float16" in found.message


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: (x / x.detach().abs()).float().sum(),
        lambda x: (x / (x.detach().abs() + 1e-4 * 0)).float().sum(),
        lambda x: x.log().float().sum(),
    ],
)
def test_no_eps_is_spoken_of_where_the_line_has_none(loss):
    found = finding(loss, 1.0, 0.0, dtype=HALF)
    assert found.cause in ("division-by-zero", "log-of-nonpositive")
    assert found.notes == ()


def test_a_number_that_half_does_not_hold_is_a_note_where_it_may_have_been_for_the_divisor():
    found = finding(lambda x: (x / torch.maximum(x.detach(), x.detach() + 1e-8)).float().sum(), 1.0, 0.0, dtype=HALF)
    assert (found.cause, found.notes) == (
        "division-by-zero",
        ("the 1e-08 in this line is 0 in float16, as anything below 2.98e-08 is",),
    )


def test_a_difference_from_1_that_half_rounds_to_0_is_noted():
    (note,) = finding(lambda x: (1 - x.sigmoid()).log().float().sum(), 1.0, 20.0, dtype=HALF).notes
    assert note == "in float16 what is closer to 1 than 0.000244 is 1, and 1 minus it 0"


def test_a_product_that_underflows_in_float32_is_no_matter_of_half_precision():
    assert finding(lambda x: (1 / (x * x)).sum(), 1.0, 1e-30).cause == "division-by-zero"


def test_a_root_of_a_difference_of_squares_is_put_down_to_rounding():
    def deviation(x: Tensor) -> Tensor:
        return ((x * x).mean() - x.mean() ** 2).sqrt()

    torch.manual_seed(1)
    rows = [3000 + 1e-3 * torch.randn(64) for _ in range(32)]
    negative = next(row for row in rows if float((row * row).mean() - row.mean() ** 2) < 0)
    found = finding(deviation, *negative.tolist())
    assert found.cause == "root-of-negative"
    assert found.notes == ("at the first of them it is a difference of numbers near 9e+06, 1 apart in float32",)


# What to try


@pytest.mark.parametrize(
    ("loss", "values", "words"),
    [
        (lambda x: x.exp().sum(-1, keepdim=True).log().sum(), (-200.0, -300.0), "use torch.logsumexp"),
        (lambda x: (1 - x.sigmoid()).log().sum(), (1.0, 30.0), "work on the logits"),
        (lambda x: x[None].softmax(-1)[:, 1].log().sum(), (300.0, 0.0), "work on the logits"),
        (lambda x: x.square().log().sum(), (1.0, 0.0), "keep the argument above 0 where it is made"),
        (lambda x: x.log().sum(), (1.0, -0.4), "look at how the argument comes below 0"),
    ],
)
def test_the_help_suits_what_the_logarithm_was_taken_of(loss, values, words):
    (help_,) = finding(loss, *values).help
    assert help_.startswith(words)


def test_a_tensor_of_nan_that_is_written_in_part_is_not_said_to_come_from_elsewhere():
    def partly(x: Tensor) -> Tensor:
        out = torch.full((3,), math.nan)
        out[:2] = x
        return out.mean()

    found = finding(partly, 1.0, 2.0)
    assert found.cause == "non-finite-number"
    assert found.help == ("write to all of the tensor before it is read, or begin with a finite number",)


# Causes of their own


def _masked(x: Tensor) -> Tensor:
    return x[None].repeat(2, 1).masked_fill(torch.tensor([False, True]), -math.inf)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: F.cross_entropy(_masked(x), torch.tensor([0, 1])),
        lambda x: -_masked(x).log_softmax(-1).gather(1, torch.tensor([[0], [1]])).mean(),
        lambda x: -torch.distributions.Categorical(logits=_masked(x)).log_prob(torch.tensor([0, 1])).mean(),
    ],
)
def test_a_label_on_a_masked_class_is_named(loss):
    assert finding(loss, 1.0, 2.0).cause == "masked-entry-in-loss"


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: F.cross_entropy(_masked(x), torch.tensor([0, 0])),
        lambda x: F.cross_entropy(_masked(x), torch.tensor([0, 1]), reduction="none")[:1].sum(),
    ],
)
def test_a_mask_that_no_label_lies_on_is_no_finding(loss):
    assert finding(loss, 1.0, 2.0) is None


def test_the_mean_of_a_row_that_is_all_nan_is_an_empty_reduction():
    rows = torch.tensor([[1.0, math.nan], [math.nan, math.nan]])
    found = finding(lambda x: (x * rows.nanmean(1)).sum(), 1.0, 2.0)
    assert (found.cause, found.message) == (
        "empty-reduction",
        "nanmean of values that are all NaN at 1 element, first at [1]",
    )


def test_a_masked_mean_over_no_value_stays_a_division_by_zero():
    keep = torch.tensor([False, False])
    assert finding(lambda x: (x * keep).sum() / keep.sum(), 1.0, 2.0).cause == "division-by-zero"


@pytest.mark.parametrize("size", [200.0, 2000.0])
def test_an_exponential_of_a_matrix_that_overflows_is_named(size):
    assert finding(lambda x: torch.linalg.matrix_exp(torch.diag(x)).sum(), size, 0.0).cause == "overflow"


def test_functions_of_matrices_are_those_of_float64():
    given = torch.tensor([[150.0, 1.0], [0.5, 100.0]])
    output = torch.linalg.matrix_exp(given)
    places = [tuple(place) for place in (~output.isfinite()).nonzero().tolist()]
    op = FocusedOp("aten::linalg_matrix_exp", ("self",), (given,), {}, (output,))
    oracle = torch.linalg.matrix_exp(given.double())
    found = recomputed(op, 0, places)
    assert [one.value for one in found] == pytest.approx([float(oracle[place]) for place in places], rel=1e-12)
    assert {one.largest for one in found} == {float(oracle.max())}


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: torch.lgamma(x * 1e37).sum(),
        lambda x: torch.special.i0(x * 1e2).sum(),
        lambda x: torch.linalg.det(torch.diag(x * 1e20)),
    ],
)
def test_other_functions_that_overflow_are_named(loss):
    assert finding(loss, 1.0, 2.0).cause == "overflow"
