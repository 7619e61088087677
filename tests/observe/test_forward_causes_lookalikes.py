"""Faults that look like one cause and are another, or none that is known; and what the evidence costs and leaves."""

import math
import time

import pytest
import torch
import torch.nn.functional as F
from test_forward_causes import BRAIN, HALF, Scaled, finding

import nanhunt
from nanhunt.observe.op_info import FocusedOp
from nanhunt.observe.recomputed import recomputed

F32 = torch.float32


@torch.library.custom_op("forward_causes::exp", mutates_args=())
def custom_exp(x: torch.Tensor) -> torch.Tensor:
    return x.exp()


@custom_exp.register_fake
def _(x):
    return torch.empty_like(x)


LOOKALIKES = {
    # A quotient too large is no division by zero, however small the divisor.
    "tiny-divisor": (lambda x: (x / 1e-30).sum(), (1.0, 1e30), F32, "overflow"),
    "tiny-divisor-in-half": (lambda x: (x / 1e-3).float().sum(), (1.0, 300.0), HALF, "half-precision-overflow"),
    "subnormal-divisor": (lambda x: (1 / x).sum(), (1.0, 1e-40), F32, "overflow"),
    # The same values in a type that does not end there.
    "square-beyond-half-in-bfloat16": (lambda x: (x * x * 1e36).sum(), (1.0, 300.0), BRAIN, "overflow"),
    "exponential-of-an-infinite-argument": (
        lambda x: (x * math.inf).exp().sum(),
        (1.0, 2.0),
        F32,
        "non-finite-number",
    ),
    # A power of a negative number is no power of zero, and no overflow.
    "root-as-a-power": (lambda x: (x**-0.5).sum(), (1.0, -1.0), F32, "out-of-domain"),
    "large-power": (lambda x: (x**-20.0).sum(), (1.0, 1e-3), F32, "overflow"),
    # A divisor of 0 that nothing in half precision made.
    "zero-divisor-in-half": (lambda x: (1 / (x - x)).float().sum(), (1.0, 2.0), HALF, "division-by-zero"),
    "clamp-at-zero-in-half": (lambda x: (1 / x.clamp(min=0.0)).float().sum(), (1.0, -1.0), HALF, "division-by-zero"),
    "bound-that-half-holds": (
        lambda x: (1 - x.clamp(0.001, 1.0)).log().float().sum(),
        (0.5, 1.0),
        HALF,
        "log-of-nonpositive",
    ),
    "bound-that-float32-holds": (lambda x: (1 - x.clamp(0.0, 1.0)).log().sum(), (0.5, 1.0), F32, "log-of-nonpositive"),
    # Rows that are masked in part are none that are masked throughout.
    "softmax-of-a-row-with-infinity": (
        lambda x: x.masked_fill(x > 1, math.inf).softmax(0).sum(),
        (1.0, 2.0),
        F32,
        "infinity-minus-infinity",
    ),
    "difference-of-two-masks": (
        lambda x: (x.masked_fill(x > 1, -math.inf) - x.masked_fill(x > 1, -math.inf)).sum(),
        (1.0, 2.0),
        F32,
        "infinity-minus-infinity",
    ),
    # A deviation that overflows is taken over enough values.
    "variance-of-large-values": (lambda x: x.var(), (1e30, -1e30), F32, "overflow"),
    "mean-of-large-values": (lambda x: x.mean(), (3e38, 3e38), F32, "overflow"),
    # A norm with an eps overflows; one without an eps and without a constant row does as well.
    "loss-of-large-scores": (
        lambda x: F.mse_loss(x, -x),
        (1e30, 1e30),
        F32,
        "overflow",
    ),
    # Nothing is known of what an operation of the user's does, nor of one that no rule describes.
    "operation-of-the-user": (lambda x: custom_exp(x.detach()).sum() * x.sum(), (1.0, 200.0), F32, "unknown"),
    "function-without-a-rule": (
        lambda x: torch.special.bessel_y0(x.detach()).sum() * x.sum(),
        (1.0, 0.0),
        F32,
        "unknown",
    ),
}


@pytest.mark.parametrize(("loss", "values", "dtype", "cause"), LOOKALIKES.values(), ids=LOOKALIKES)
def test_a_look_alike_is_told_apart(loss, values, dtype, cause):
    assert finding(loss, *values, dtype=dtype).cause == cause


@pytest.mark.parametrize(
    ("loss", "values"),
    [
        (lambda x: x.masked_fill(x > 1, -math.inf).softmax(0).sum(), (1.0, 2.0)),
        (lambda x: x.masked_fill(x > 1, -math.inf).exp().sum(), (1.0, 2.0)),
        (lambda x: torch.where(x > 1, x, (x * 1e30 * 1e30).detach()).clamp(max=3.0).sum(), (1.0, 2.0)),
        (lambda x: x[x > 0].mean(), (1.0, 2.0)),
        (lambda x: F.ctc_loss(x.repeat(4, 1, 3).log_softmax(-1), torch.tensor([[1, 2]]), (4,), (2,)), (1.0, 2.0)),
    ],
)
def test_what_does_no_harm_is_no_finding(loss, values):
    assert finding(loss, *values) is None


# The values in float64


def _once(op, *args, **kwargs):
    output = op(*args, **kwargs)
    names = tuple(argument.name for argument in op._schema.arguments)
    focused = FocusedOp(op._schema.name, names, args, kwargs, (output,))
    positions = [tuple(place) for place in (~output.isfinite()).nonzero().tolist()]
    return recomputed(focused, 0, positions[:8]), positions


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_an_element_of_a_convolution_is_that_of_float64(stride, padding, dilation, groups):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4, 7, 6) * 3e19, torch.randn(4, 4 // groups, 3, 2) * 3e19, torch.randn(4)
    args = ([stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], groups)
    found, positions = _once(torch.ops.aten.convolution.default, x, weight, bias, *args)
    oracle = torch.ops.aten.convolution(x.double(), weight.double(), bias.double(), *args)
    assert len(found) > 2
    assert [one.value for one in found] == pytest.approx([float(oracle[p]) for p in positions[: len(found)]], rel=1e-12)


@pytest.mark.parametrize(
    ("op", "shapes", "numbers"),
    [
        (torch.ops.aten.mm.default, [(3, 4), (4, 5)], {}),
        (torch.ops.aten.bmm.default, [(2, 3, 4), (2, 4, 5)], {}),
        (torch.ops.aten.mv.default, [(3, 4), (4,)], {}),
        (torch.ops.aten.dot.default, [(4,), (4,)], {}),
        (torch.ops.aten.addmm.default, [(5,), (3, 4), (4, 5)], {"beta": 2, "alpha": 3}),
        (torch.ops.aten.baddbmm.default, [(2, 1, 5), (2, 3, 4), (2, 4, 5)], {"beta": 0.5}),
        (torch.ops.aten.addmv.default, [(3,), (3, 4), (4,)], {}),
    ],
)
def test_an_element_of_a_product_is_that_of_float64(op, shapes, numbers):
    torch.manual_seed(0)
    given = [(1 + torch.rand(shape)) * 3e19 for shape in shapes]
    if len(given) == 3:
        given[0] *= 1e18
    found, positions = _once(op, *given, **numbers)
    oracle = op(*(tensor.double() for tensor in given), **numbers)
    assert found
    assert [one.value for one in found] == pytest.approx([float(oracle[p]) for p in positions[: len(found)]], rel=1e-12)
    assert all(one.largest == pytest.approx(one.value, rel=1e-12) for one in found)


def test_random_numbers_and_results_are_what_they_are_without_the_evidence():
    x = torch.tensor([1.0, 1e30])
    torch.manual_seed(3)
    expected = ((x * x).sum(), torch.rand(3))
    torch.manual_seed(3)
    model = Scaled(lambda x: (x * x).sum())
    with nanhunt.trace(model) as hunt:
        loss = model(x)
        drawn = torch.rand(3)
        loss.backward()
    assert (loss.item(), drawn.tolist()) == (expected[0].item(), expected[1].tolist())
    assert hunt.report().first.cause == "overflow"


def test_the_evidence_on_a_large_product_takes_no_longer_than_the_product():
    x = torch.full((600, 600), 1e30)
    start = time.perf_counter()
    output = x @ x
    product_s = time.perf_counter() - start
    op = FocusedOp("aten::mm", ("self", "mat2"), (x, x), {}, (output,))
    start = time.perf_counter()
    found = recomputed(op, 0, [(0, 0), (599, 599)])
    assert time.perf_counter() - start < product_s + 0.05
    assert [one.value for one in found] == pytest.approx([6e62] * 2)
