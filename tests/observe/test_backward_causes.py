"""Causes of faults of the backward pass, each in a step of training that anybody could have written."""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import nanhunt
from nanhunt.observe.backward_evidence import engine_roots

INF = math.inf
LossOf = Callable[[Tensor], Tensor]


def trained(values: Any, loss_of: LossOf, dtype: torch.dtype = torch.float32) -> Any:
    """The first finding of a step of training; None if there is none."""
    model = nn.ParameterDict({"x": nn.Parameter(torch.tensor(values, dtype=dtype))})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    with nanhunt.trace(model, optimizer=optimizer) as hunt:
        loss = loss_of(model["x"])
        assert math.isfinite(loss.item())
        loss.backward()
        optimizer.step()
    report = hunt.report()
    assert [skip.what for skip in report.skips if "looking at an operation" in skip.what] == []
    return report.first


ENDS = torch.tensor([0.0, 2.0])


def counted(x: Tensor) -> Tensor:
    return torch.where(ENDS > 0, 3 * (x / ENDS), 0.0).sum()


def used_twice(x: Tensor) -> Tensor:
    logs = x.log()
    return torch.where(x > 0, logs, 0.0).sum() + logs[x > 0].sum()


def used_whole(x: Tensor) -> Tensor:
    roots = x.sqrt()
    return torch.where(x > 0, roots, 0.0).sum() + roots.sum()


def weighted_below_a_where(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x.sqrt() * torch.tensor([0.0, 1.0]), x).sum()


def in_place(x: Tensor) -> Tensor:
    logs = x.log() + 0
    logs[x == 0] = 0.0
    return logs.sum()


def with_hook(hook: Callable[[Tensor], Tensor]) -> LossOf:
    def loss(x: Tensor) -> Tensor:
        doubled = x * 2
        doubled.register_hook(hook)
        return doubled.sum()

    return loss


class Keep(torch.autograd.Function):
    """Its backward takes a Bessel function at its pole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * torch.special.bessel_y0(x)


class Logged(Keep):
    """Its backward takes a logarithm."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.log()


def forward_algorithm(x: Tensor) -> Tensor:
    start = torch.tensor([0.0, -INF, -INF])
    stays_or_ends = torch.tensor([[0.0, -INF, -INF], [0.0, 0.0, -INF], [-INF, -INF, -INF]])
    alpha = torch.logsumexp((start + x)[:, None] + stays_or_ends, 0)
    return torch.logsumexp(alpha[:2].clamp(min=-1e4) + x[:2], 0) + torch.logsumexp(stays_or_ends + x, 1)[:2].sum()


CAUSES: Sequence[tuple[str, str, str, Any, LossOf]] = [
    ("NH202", "sqrt at 0", "a root of a sum of squares", [0.0, 0.0], lambda x: (x**2).sum().sqrt()),
    ("NH202", "hypot at 0", "hypot", [0.0, 1.0], lambda x: torch.hypot(x, x).sum()),
    ("NH202", "sqrt at 0", "a result used whole and in part", [0.0, 1.0], used_whole),
    ("NH202", "sqrt at 0", "a product with a mask", [0.0, 1.0], lambda x: (x.sqrt() * (x > 0)).sum()),
    ("NH202", "sqrt at 0", "a loss that is multiplied by 0", [0.0, 1.0], lambda x: (x.sqrt() * 0).sum()),
    ("NH202", "sqrt at 0", "a weight of 0 below a where that takes all", [0.0, 1.0], weighted_below_a_where),
    ("NH202", "sqrt at 0", "a clamp before it", [0.0, 1.0], lambda x: x.clamp(min=0).sqrt().sum()),
    ("NH202", "sqrt at 0", "a hinge below a root", [0.0, 1.0], lambda x: F.relu(x.sqrt() - 0.5).sum()),
    ("NH202", "sqrt at 0", "where all was cut", [0.0, 0.0], lambda x: torch.where(x > 0, x.sqrt(), x).sum()),
    ("NH208", "log for 1 element that where", "where", [0.0, 1.0], lambda x: torch.where(x > 0, x.log(), 0.0).sum()),
    ("NH208", "log1p for 1 element that where", "log1p", [-1.0, 1.0], lambda x: x.log1p().where(x > -1, x).sum()),
    ("NH208", "sqrt for 1 element that where", "root", [0.0, 1.0], lambda x: torch.where(x > 0, x.sqrt(), 0.0).sum()),
    ("NH208", "log for 1 element that indexing", "mask", [0.0, 1.0], lambda x: (x.log() - 1)[x > 0].mean()),
    ("NH208", "log for 1 element that masked_fill", "fill", [0.0, 1.0], lambda x: x.log().masked_fill(x == 0, 0).sum()),
    ("NH208", "that gather", "gather", [[0.0, 1.0]], lambda x: x.log().gather(1, torch.tensor([[1]])).sum()),
    ("NH202", "sqrt at 0", "clamp", [0.0, 1.0], lambda x: x.sqrt().clamp(min=1e-6).sum()),
    ("NH202", "sqrt at 0", "maximum", [0.0, 1.0], lambda x: torch.maximum(x.sqrt(), torch.tensor(1e-6)).sum()),
    ("NH208", "div for 1 element that where", "a quotient", [1.0, 2.0], counted),
    (
        "NH208",
        "div for 1 element that where",
        "0 / 0",
        [0.0, 2.0],
        lambda x: torch.where(x > 0, x.sin() / x, 1.0).sum(),
    ),
    (
        "NH208",
        "log for 1 element that where",
        "scaled",
        [0.0, 1.0],
        lambda x: torch.where(x > 0, 2 * x.log(), 0.0).sum(),
    ),
    ("NH208", "log for 2 elements that where", "all", [0.0, 0.0], lambda x: torch.where(x > 0, x.log(), 0.0).sum()),
    ("NH208", "that indexing", "a write in place", [0.0, 1.0], in_place),
    ("NH208", "log for 1 element", "both readers cut", [0.0, 1.0], used_twice),
    ("NH208", "acos for 1 element", "acos", [1.0, 0.5], lambda x: torch.where(x < 1, x.acos(), 0.0).sum()),
    ("NH208", "pow for 1 element", "power", [0.0, 0.5], lambda x: torch.where(x > 0, x**0.3, 0.0).sum()),
    ("NH208", "logit for 1 element", "logit", [1.0, 0.5], lambda x: torch.where(x < 1, x.logit(), 0.0).sum()),
    ("NH103", "divided by 0", "a bound on a quotient", [1.0, 2.0], lambda x: (x / ENDS).clamp(max=5.0).sum()),
    ("NH209", "x ** 0.5 at 0", "a fractional power", [0.0, 1.0], lambda x: x.pow(0.5).sum()),
    ("NH209", "x ** 0.25 at 0", "a tensor of exponents", [0.0, 1.0], lambda x: x.pow(torch.tensor([0.25, 2.0])).sum()),
    ("NH210", "acos at 1", "acos", [1.0, 0.5], lambda x: x.acos().sum()),
    ("NH210", "asin at -1", "asin", [-1.0, 0.5], lambda x: x.asin().sum()),
    ("NH210", "acosh at 1", "acosh", [1.0, 2.0], lambda x: x.acosh().sum()),
    ("NH210", "atanh at 1", "atanh", [1.0, 0.5], lambda x: x.atanh().tanh().sum()),
    ("NH211", "special_entr at 0", "entropy", [0.0, 0.5], lambda x: torch.special.entr(x).sum()),
    ("NH211", "xlogy at 0", "xlogy", [0.0, 0.5], lambda x: torch.xlogy(x.detach(), x).sum()),
    ("NH211", "log at 0", "an exponential undoes the log", [0.0, 0.5], lambda x: x.log().exp().sum()),
    ("NH212", "slope of reciprocal at 1e-30 is -1e+60", "a reciprocal", [1e-30, 1.0], lambda x: (1 / x).sum()),
    ("NH212", "slope of div at 1e-30 is -1e+57", "a quotient", [1e-30, 1.0], lambda x: (torch.tensor(1e-3) / x).sum()),
    ("NH212", "slope of rsqrt at 1e-30 is -5e+44", "rsqrt", [1e-30, 1.0], lambda x: x.rsqrt().sum()),
    ("NH212", "slope of rsqrt at 1.58e-26 is -2.5", "by way of", [1.58e-26, 1.0], lambda x: x.rsqrt().sum()),
    ("NH212", "gradient of log at 1e-30 is -1e+40", "log", [1e-30, 1.0], lambda x: x.log().sum() * -1e10),
    ("NH212", "gradient of div at 1e-30 is -1e+40", "numerator", [1e-10], lambda x: (x / 1e-30 * -1e10).sum()),
    ("NH212", "gradient of div at 1e-30 is -1e+40", "both", [0.0, 1e-30], lambda x: (x[0] / x[1]) * -1e10),
    ("NH222", "at the base -2 for 1", "exponent", [2.0, 2.0], lambda p: (torch.tensor([-2.0, 3.0]) ** p).sum()),
    ("NH222", "at a negative base for 2", "exponent of a number", [2.0, 3.0], lambda p: ((-2.0) ** p).sum()),
    ("NH213", "singular value of the matrix is 1e-25", "inv", [[1e-25, 0], [0, 1]], lambda x: x.inverse().sum()),
    ("NH213", "diagonal of R is 0 (column 1)", "qr", [[1.0, 0], [0, 0]], lambda x: torch.linalg.qr(x).Q.sum()),
    ("NH213", "pivot", "solve", [[1.0, 0], [0, 1e-25]], lambda x: torch.linalg.solve(x, torch.ones(2)).sum()),
    ("NH203", "gap 0", "eigh", [[1.0, 0], [0, 1]], lambda x: torch.linalg.eigh(x).eigenvectors.sum()),
    ("NH203", "equal", "eig", [[1.0, 0], [0, 1]], lambda x: torch.linalg.eig(x).eigenvectors.abs().sum()),
    ("NH203", "gap 0", "svd", [[1.0, 0], [0, 1]], lambda x: torch.linalg.svd(x).U.sum()),
    ("NH214", "value 1 is 0", "thin svd", [[1.0, 0], [0, 0], [0, 0]], lambda x: torch.linalg.svd(x, False).U.sum()),
    ("NH217", "logsumexp over -inf alone", "a forbidden path", [0.1, 0.2, 0.3], forward_algorithm),
    ("NH220", "came to 1e+39", "inv", [[1e-10, 0], [0, 1]], lambda x: x.inverse().sum() * 1e19),
    ("NH220", "came to 1e+40", "a product", [1.0], lambda x: (x * 1e-30 * 1e20 * 1e20).sum()),
    ("NH228", "in the backward of Keep", "a Function", [0.0, 1.0], lambda x: Keep.apply(x).sum()),
    ("NH501", "log of 0", "a Function's logarithm", [0.0, 1.0], lambda x: Logged.apply(x).sum()),
    ("NH229", "from a division by 0", "a hook", [0.0, 1.0], with_hook(lambda gradient: gradient / (gradient * 0))),
    ("NH229", "in a gradient hook", "a hook's log", [0.0, 1.0], with_hook(lambda gradient: (gradient * 0).log())),
]


@pytest.mark.parametrize(("code", "says", "values", "loss_of"), [(c[0], c[1], *c[3:]) for c in CAUSES])
def test_cause_of_a_gradient_is_named(code: str, says: str, values: Any, loss_of: LossOf):
    first = trained(values, loss_of)

    assert (first.code, first.certainty, first.location.phase) == (code, "observed", "backward")
    assert says in first.message


HALF: Sequence[tuple[str, LossOf]] = [
    ("came to 122880", lambda x: (x * 30).float().sum() * 2**12),
    ("came to 131072", lambda x: x.float().sum() * 2**17),
    ("came to 80000", lambda x: x.float().sum() * 40000 + x.float().sum() * 40000),
    ("for 4 elements", lambda x: (x[None] @ torch.full((4, 4), 300.0, dtype=torch.half)).float().sum() * 200),
]


@pytest.mark.parametrize(("says", "loss_of"), HALF)
def test_gradient_beyond_float16_is_named_with_its_exact_value(says: str, loss_of: LossOf):
    first = trained([0.01] * 4, loss_of, torch.half)

    assert (first.code, first.cause) == ("NH219", "half-precision-gradient-overflow")
    assert "beyond the 65504 that float16 ends at" in first.message
    assert says in first.message


def test_half_gradients_that_overflow_as_they_accumulate_are_named_although_one_term_is_written_over():
    model = nn.Linear(3, 1, bias=False).half()
    with nanhunt.trace(model) as hunt:
        for _ in range(2):
            (model(torch.ones(1, 3, dtype=torch.half)).float() * 40000).sum().backward()

    assert hunt.report().first.code == "NH219"


FINITE: Sequence[tuple[Any, LossOf]] = [
    ([0.0, 0.0], lambda x: torch.linalg.vector_norm(x)),
    ([0.0, 0.0], lambda x: torch.linalg.vector_norm(x, 0.5)),
    ([0.0, 0.0], lambda x: torch.linalg.vector_norm(x, 3)),
    ([[0.0, 0.0]], lambda x: F.normalize(x).sum()),
    ([[0.0, 0.0]], lambda x: F.cosine_similarity(x, torch.ones(1, 2)).sum()),
    ([1.0, 1.0], lambda x: x.std()),
    ([0.0, 0.0], lambda x: torch.atan2(x, x * 0).sum()),
    ([[1.0, 2.0], [1.0, 2.0]], lambda x: torch.pdist(x, 1.5).sum()),
    ([[1.0, 2.0], [1.0, 2.0]], lambda x: torch.cdist(x, x.detach(), 0.5).sum()),
    ([0.0, 1.0], lambda x: F.binary_cross_entropy(x, torch.tensor([1.0, 0.0]))),
    ([0.0, 1.0], lambda x: torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), 0.0).sum()),
    ([-1.0, 1.0], lambda x: x.clamp(min=0).sqrt().sum()),
    ([0.0, 1.0], lambda x: (x + 1e-12).sqrt().sum()),
    ([[0.0, 0.0], [0.0, 0.0]], lambda x: torch.linalg.pinv(x).sum()),
    ([[1.0, 0.0], [0.0, 1.0]], lambda x: torch.linalg.eigvalsh(x).sum()),
]


@pytest.mark.parametrize(("values", "loss_of"), FINITE)
def test_what_torch_takes_care_of_is_no_fault(values: Any, loss_of: LossOf):
    assert trained(values, loss_of) is None


def test_zero_gradient_of_unknown_making_is_a_note_and_no_cause():
    first = trained([0.0, 1.0], lambda x: (x.sqrt() * (x > 0)).sum())

    assert first.code == "NH202"
    assert first.notes[0].startswith("the gradient that came in was 0 there: if a mask cuts this branch off")


def test_cut_of_all_elements_is_a_note_and_no_cause():
    first = trained([0.0, 0.0], lambda x: torch.where(x > 0, x.sqrt(), x).sum())

    assert first.notes == ("the gradient that came in was 0 there, and where is what read the result",)


def test_infinite_gradient_has_no_note_on_a_zero():
    assert trained([0.0, 1.0], lambda x: x.sqrt().sum()).notes == ()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_branch_inside_a_checkpoint_is_found_in_its_own_graph(use_reentrant: bool):
    def loss(x: Tensor) -> Tensor:
        part = torch.utils.checkpoint.checkpoint(
            lambda y: torch.where(y > 0, y.log(), 0.0), x * 1, use_reentrant=use_reentrant
        )
        return part.sum()

    first = trained([0.0, 1.0], loss)

    assert (first.code, first.evidence["cut_by"]) == ("NH208", "where")


def test_root_whose_given_gradient_is_zero_is_not_cut_by_anything():
    model = nn.ParameterDict({"x": nn.Parameter(torch.tensor([0.0, 1.0]))})
    with nanhunt.trace(model) as hunt:
        model["x"].sqrt().backward(torch.tensor([0.0, 1.0]))
    first = hunt.report().first

    assert first.code == "NH202"
    assert first.notes[0].startswith("the gradient that came in was 0 there: if a mask")


def test_result_that_is_a_root_itself_is_not_cut_by_what_reads_it():
    model = nn.ParameterDict({"x": nn.Parameter(torch.tensor([0.0, 1.0]))})
    with nanhunt.trace(model) as hunt:
        root = model["x"].sqrt()
        read = torch.where(model["x"] > 0, root, 0.0)
        torch.autograd.backward([root, read], [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])])

    assert hunt.report().first.code == "NH202"


def test_branch_in_a_second_derivative_is_found_in_the_graph_that_runs():
    def loss(x: Tensor) -> Tensor:
        slope = torch.autograd.grad((x**3).sum(), x, create_graph=True)[0]
        return torch.where(slope > 0, slope.sqrt(), 0.0).sum()

    assert trained([0.0, 1.0], loss).code == "NH208"


def test_mode_of_the_users_is_no_gradient_hook():
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    def loss(x: Tensor) -> Tensor:
        return x.sqrt().sum()

    model = nn.ParameterDict({"x": nn.Parameter(torch.tensor([0.0, 1.0]))})
    with nanhunt.trace(model) as hunt, Watching():
        loss(model["x"]).backward()

    assert hunt.report().first.code != "NH229"


def test_roots_of_an_engine_that_works_in_another_thread_are_found():
    x = torch.ones(2, requires_grad=True)
    y = (x * 2).sum()
    found: list[Any] = []

    def look(gradient: Tensor) -> None:
        thread = threading.Thread(target=lambda: found.extend(engine_roots()))
        thread.start()
        thread.join()

    x.register_hook(look)
    y.backward()

    assert found == [y.grad_fn]


def test_unknown_cause_comes_with_what_both_operations_held():
    first = trained([1.0, 0.5], lambda x: x.erfinv().tanh().sum())

    assert (first.code, first.certainty, first.location.op) == ("NH201", "unknown", "aten::erfinv")
    assert first.notes == (
        "at [0], aten::erfinv held self 1",
        "at [0], aten::erfinv held self 1",
    )
