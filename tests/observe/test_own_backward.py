"""A fault in a backward that the user wrote is shown with its line, beside the forward line it belongs to."""

import torch
from torch import Tensor, nn

from nanhunt.observe.exact import ExactTracer
from nanhunt.records.ops import OpRecord, Trace
from nanhunt.rules.registry import Case, judge


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, rows: Tensor) -> Tensor:
        norm = rows.norm(dim=-1, keepdim=True)
        ctx.save_for_backward(rows, norm)
        return norm

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        rows, norm = ctx.saved_tensors
        return gradient * rows / norm


def traced(loss: Tensor, tracer: ExactTracer, leaf: Tensor) -> Trace:
    with tracer.phase("backward"):
        loss.backward()
    tracer.reached("gradient", [("leaf", leaf.grad)])
    assert tracer.trace.problems == ()
    return tracer.trace


def test_line_of_the_users_backward_is_kept_beside_the_forward_line():
    leaf = torch.zeros(2, 3, requires_grad=True)
    with ExactTracer() as tracer:
        norm = _Norm.apply(leaf)
        offender = traced(norm.sum(), tracer, leaf).first_offender

    assert isinstance(offender, OpRecord)
    assert (offender.op, offender.source.text) == ("aten::div", "norm = _Norm.apply(leaf)")
    assert offender.own_backward.text == "return gradient * rows / norm"
    assert judge(Case(offender)).notes == (
        f"it ran in a backward of your own, line {offender.own_backward.line}: return gradient * rows / norm",
    )


def test_backward_of_torch_has_no_line_of_its_own():
    leaf = torch.zeros(3, requires_grad=True)
    with ExactTracer() as tracer:
        offender = traced(leaf.sqrt().sum() * 0, tracer, leaf).first_offender

    assert offender.own_backward is None
    assert judge(Case(offender)).notes == ()


def test_checkpointing_is_torchs_own_backward():
    leaf = torch.zeros(3, requires_grad=True)
    model = nn.Identity()
    with ExactTracer(model) as tracer:
        value = torch.utils.checkpoint.checkpoint(lambda x: model(x).sqrt(), leaf, use_reentrant=True)
        offender = traced(value.sum() * 0, tracer, leaf).first_offender

    assert offender.own_backward is None
