"""The cause of a fault of the forward pass, named from the values at the offending elements of a real loss."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nanhunt

HALF, BRAIN = torch.float16, torch.bfloat16

pytestmark = pytest.mark.filterwarnings("ignore:.*degrees of freedom is <= 0.*")


class Scaled(nn.Module):
    """One factor of 1 in front of what is lost."""

    def __init__(self, loss: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.factor, self.loss = nn.Parameter(torch.ones((), dtype=dtype)), loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.factor * x)


def finding(loss: Callable[[Tensor], Tensor], *values: float, dtype: torch.dtype = torch.float32):
    model = Scaled(loss, dtype)
    with nanhunt.trace(model) as hunt:
        model(torch.tensor(values, dtype=dtype)).backward()
    return hunt.report().first


CAUSES = {
    "exp-overflow": [
        (lambda x: x.exp().sum(), (1.0, 88.8), torch.float32),
        (lambda x: x.exp2().sum(), (1.0, 128.0), torch.float32),
        (lambda x: x.cosh().sum(), (1.0, -90.0), torch.float32),
        (lambda x: x.exp().float().sum(), (1.0, 11.2), HALF),
        (lambda x: (x + 0).exp_().sum(), (1.0, 200.0), torch.float32),
        (lambda x: torch.log(1 + x.exp()).sum(), (1.0, 100.0), torch.float32),
    ],
    "half-precision-overflow": [
        (lambda x: x.square().float().sum(), (1.0, 300.0), HALF),
        (lambda x: (x[:, None] @ x[None, :]).float().sum(), (1.0, 300.0), HALF),
        (lambda x: F.linear(x, torch.full((3, 2), 300.0, dtype=HALF)).float().sum(), (1.0, 300.0), HALF),
        (lambda x: (x + x).float().sum(), (1.0, 40000.0), HALF),
        (lambda x: (x / 1e-3).float().sum(), (1.0, 300.0), HALF),
        (lambda x: x.half().float().sum(), (1.0, 1e5), torch.float32),
        (lambda x: x.clone().mul_(300.0).float().sum(), (1.0, 300.0), HALF),
        (lambda x: F.conv1d(x[None, None], torch.full((1, 1, 2), 300.0, dtype=HALF)).float().sum(), (1.0, 300.0), HALF),
    ],
    "overflow": [
        (lambda x: (x * x).sum(), (1.0, 1e30), torch.float32),
        (lambda x: (x / 1e-30).sum(), (1.0, 1e30), torch.float32),
        (lambda x: (x**3).sum(), (1.0, 1e15), torch.float32),
        (lambda x: (x + x).sum(), (1.0, 3e38), torch.float32),
        (lambda x: x.sum(), (3e38, 3e38), torch.float32),
        (lambda x: (x[None] @ x[:, None]).sum(), (1e30, 1e30), torch.float32),
        (lambda x: x.clone().mul_(1e30).sum(), (1.0, 1e30), torch.float32),
        (lambda x: torch.linalg.vector_norm(x), (1e30, 1e30), torch.float32),
        (lambda x: (x[None] @ torch.tensor([[1e30], [-1e30]])).sum(), (1e30, 1e30), torch.float32),
        (lambda x: (x * x).sum(), (1.0, 1e200), torch.float64),
    ],
    "division-by-zero": [
        (lambda x: (1 / x).sum(), (1.0, 0.0), torch.float32),
        (lambda x: (x / x).sum(), (1.0, 0.0), torch.float32),
        (lambda x: x.clone().div_(torch.tensor([1.0, 0.0])).sum(), (1.0, 2.0), torch.float32),
        (lambda x: x.remainder(torch.tensor([1.0, 0.0])).sum(), (1.0, 2.0), torch.float32),
        (lambda x: (x * (torch.tensor(3) / torch.tensor(0))).sum(), (1.0, 2.0), torch.float32),
        (lambda x: F.softplus(x, beta=0).sum(), (1.0, 2.0), torch.float32),
    ],
    "half-precision-underflow": [
        (lambda x: (x / (x.square().sqrt() + 1e-8)).float().sum(), (1.0, 0.0), HALF),
        (lambda x: (1 / x.clamp(min=1e-8)).float().sum(), (1.0, 0.0), HALF),
        (lambda x: x.clamp(min=1e-8).log().float().sum(), (1.0, 0.0), HALF),
        (lambda x: (1 / (x * x)).float().sum(), (1.0, 1e-4), HALF),
        (lambda x: x.exp().half().log().float().sum(), (1.0, -30.0), torch.float32),
    ],
    "bound-lost-in-half": [
        (lambda x: (1 - x.clamp(1e-6, 1 - 1e-6)).log().float().sum(), (0.5, 1.0), HALF),
        (lambda x: (1 - x.clamp(1e-6, 1 - 1e-6)).log().float().sum(), (0.5, 1.0), BRAIN),
        (lambda x: x.clamp(-1 + 1e-6, 1 - 1e-6).atanh().float().sum(), (0.5, 1.0), BRAIN),
    ],
    "root-of-negative": [
        (lambda x: x.sqrt().sum(), (1.0, -1.0), torch.float32),
        (lambda x: x.rsqrt().sum(), (1.0, -1.0), torch.float32),
        (lambda x: (x + 0).sqrt_().sum(), (1.0, -1.0), torch.float32),
        (
            lambda x: F.batch_norm(x[None], torch.zeros(2), torch.tensor([1.0, -1.0])).sum(),
            (1.0, 2.0),
            torch.float32,
        ),
    ],
    "out-of-domain": [
        (lambda x: x.acos().sum(), (0.5, 1.0000001192092896), torch.float32),
        (lambda x: x.atanh().sum(), (0.5, 1.0), torch.float32),
        (lambda x: x.logit().sum(), (0.5, 0.0), torch.float32),
        (lambda x: (x**0.5 * x**1.5).sum(), (0.5, -2.0), torch.float32),
        (lambda x: torch.xlogy(torch.ones(2), x).sum(), (0.5, 0.0), torch.float32),
        (lambda x: torch.lgamma(x).sum(), (0.5, -2.0), torch.float32),
    ],
    "power-of-zero": [
        (lambda x: (x**-0.7).sum(), (1.0, 0.0), torch.float32),
        (lambda x: torch.pow(x, torch.tensor([-1.0, -3.0])).sum(), (1.0, 0.0), torch.float32),
    ],
    "zero-times-infinity": [
        (lambda x: (x * -math.inf).sum(), (1.0, 0.0), torch.float32),
        (lambda x: (x.masked_fill(x > 1, -math.inf) * torch.tensor([1.0, 0.0])).sum(), (1.0, 2.0), torch.float32),
        (
            lambda x: (torch.zeros(1, 2) @ x.masked_fill(x > 1, -math.inf)[:, None]).sum(),
            (1.0, 2.0),
            torch.float32,
        ),
    ],
    "infinity-minus-infinity": [
        (
            lambda x: (x.masked_fill(x > 1, -math.inf) - x.masked_fill(x > 1, -math.inf)).sum(),
            (1.0, 2.0),
            torch.float32,
        ),
        (lambda x: x.masked_fill(x > 1, -math.inf).var(), (1.0, 2.0, 3.0), torch.float32),
        (lambda x: x.masked_fill(x > 1, math.inf).softmax(0)[0], (1.0, 2.0), torch.float32),
    ],
    "fully-masked-softmax-row": [
        (lambda x: x.masked_fill(x > 0, -math.inf).softmax(0).sum(), (1.0, 2.0), torch.float32),
        (
            lambda x: F.cross_entropy(x.masked_fill(x > 0, -math.inf)[None], torch.tensor([0])),
            (1.0, 2.0),
            torch.float32,
        ),
        (
            lambda x: (lambda m: (m - m.amax(-1, keepdim=True)).exp().sum())(x.masked_fill(x > 0, -math.inf)[None]),
            (1.0, 2.0),
            torch.float32,
        ),
        (
            lambda x: (lambda m: (m - m.logsumexp(-1, keepdim=True)).exp().sum())(
                x.masked_fill(x > 0, -math.inf)[None]
            ),
            (1.0, 2.0),
            torch.float32,
        ),
    ],
    "empty-reduction": [
        (lambda x: x[x > 9].mean(), (1.0, 2.0), torch.float32),
        (lambda x: x[x > 9].std(), (1.0, 2.0), torch.float32),
        (lambda x: x[:1].std(), (1.0, 2.0), torch.float32),
        (lambda x: x[None].var(0).sum(), (1.0, 2.0), torch.float32),
        (lambda x: x.var(correction=2), (1.0, 2.0), torch.float32),
        (lambda x: F.cross_entropy(x[None], torch.tensor([-100])), (1.0, 2.0), torch.float32),
        (lambda x: F.cross_entropy(x[None], torch.tensor([0]), torch.tensor([0.0, 1.0])), (1.0, 2.0), torch.float32),
        (lambda x: F.mse_loss(x[x > 9], x[x > 9]), (1.0, 2.0), torch.float32),
    ],
    "singular-matrix": [
        (lambda x: torch.linalg.slogdet(torch.outer(x, torch.zeros(2))).logabsdet, (1.0, 2.0), torch.float32),
        (lambda x: torch.linalg.inv_ex(torch.diag(x)).inverse.sum(), (1.0, 0.0), torch.float32),
        (
            lambda x: torch.linalg.solve_triangular(torch.diag(x), torch.ones(2, 1), upper=True).sum(),
            (1.0, 0.0),
            torch.float32,
        ),
        (
            lambda x: torch.linalg.solve_ex(torch.diag(x), torch.ones(2, 1)).result.sum(),
            (1.0, 0.0),
            torch.float32,
        ),
    ],
    "non-finite-number": [
        (lambda x: (x * math.inf).sum(), (1.0, 2.0), torch.float32),
        (lambda x: (x + math.nan).sum(), (1.0, 2.0), torch.float32),
        (lambda x: torch.lerp(x, -x, math.nan).sum(), (1.0, 2.0), torch.float32),
    ],
    "normalised-constant": [
        (lambda x: F.layer_norm(x, (2,), eps=0.0).sum(), (2.0, 2.0), torch.float32),
        (lambda x: F.group_norm(x[None, :, None], 1, eps=0.0).sum(), (2.0, 2.0), torch.float32),
    ],
    "log-of-nonpositive": [
        (lambda x: x.log().sum(), (1.0, 0.0), torch.float32),
        (lambda x: (x + 0).log_().sum(), (1.0, 0.0), torch.float32),
        (lambda x: (x + 0).log_().sum(), (1.0, -2.0), torch.float32),
    ],
}


@pytest.mark.parametrize(
    ("cause", "loss", "values", "dtype"),
    [
        pytest.param(cause, *case, id=f"{cause}-{number}")
        for cause, cases in CAUSES.items()
        for number, case in enumerate(cases)
    ],
)
def test_the_cause_is_named(cause, loss, values, dtype):
    assert finding(loss, *values, dtype=dtype).cause == cause


def test_a_target_longer_than_its_input_is_named():
    def loss(x: Tensor) -> Tensor:
        scores = x.repeat(2, 1, 3).log_softmax(-1)
        return F.ctc_loss(scores, torch.tensor([[1, 2, 3]]), torch.tensor([2]), torch.tensor([3]))

    found = finding(loss, 1.0, 2.0)
    assert found.cause == "target-longer-than-input"
    assert found.message == "a target of 3 labels in 2 frames has the probability 0 at 1 element, first at [0]"


def test_growth_over_the_steps_is_named_where_it_ends_in_an_overflow():
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    with nanhunt.trace(model, optimizer) as hunt:
        for _ in range(30):
            optimizer.zero_grad()
            F.mse_loss(model(torch.ones(4, 2)), torch.zeros(4, 1)).backward()
            optimizer.step()
    assert hunt.report().first.cause in ("growth-until-overflow", "diverging-weights")


def test_an_overflow_without_growth_is_not_called_growth():
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with nanhunt.trace(model, optimizer) as hunt:
        for step in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(torch.ones(4, 2)) * (1e30 if step == 5 else 1.0), torch.zeros(4, 1)).backward()
            optimizer.step()
    assert hunt.report().first.cause == "overflow"


EXP, MUL, POW = "exp of 88.8", "aten::mul comes to 1e+60", "aten::pow comes to 90000"
AT = "at 1 element, first at [1]"


@pytest.mark.parametrize(
    ("loss", "values", "dtype", "words"),
    [
        (lambda x: x.exp().sum(), (1.0, 88.8), torch.float32, f"{EXP} {AT}; float32 holds exp up to 88.7228"),
        (lambda x: (x * x).sum(), (1.0, 1e30), torch.float32, f"{MUL} {AT}; float32 ends at 3.40282e+38"),
        (lambda x: x.square().float().sum(), (1.0, 300.0), HALF, f"{POW} {AT}; float16 ends at 65504"),
        (lambda x: x[None].var(0).sum(), (1.0, 2.0), torch.float32, "aten::var over 1 value with a correction of 1"),
    ],
)
def test_the_message_quotes_value_and_limit(loss, values, dtype, words):
    assert finding(loss, *values, dtype=dtype).message == words


def test_a_note_says_where_the_infinity_came_from():
    def loss(x: Tensor) -> Tensor:
        masked = x.masked_fill(x > 1, -math.inf)
        return (masked * torch.tensor([1.0, 0.0])).sum()

    (note,) = finding(loss, 1.0, 2.0).notes
    assert note.startswith("the infinity came from aten::masked_fill, line ")
    assert note.endswith("masked = x.masked_fill(x > 1, -math.inf)")
