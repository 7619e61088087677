"""The exact tracer names the operation, module and line where a harmful non-finite value was born, and nothing else."""

import gc
import inspect
import math
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanhunt.observe import exact, journal
from nanhunt.observe.exact import ExactTracer
from nanhunt.observe.op_info import FocusReached
from nanhunt.records.ops import OpRecord, StateSource, Trace

NAN, INF = math.nan, math.inf
Named = Iterable[tuple[str, Tensor]]


def traced(loss: Callable[[], Tensor], model: nn.Module | None = None, leaves: Named = (), **declared: Named) -> Trace:
    """A step: declare, forward, backward, then look at the loss, the gradients and the model's buffers."""
    tracer = ExactTracer(model)
    leaves = [*leaves, *(model.named_parameters() if model is not None else ())]
    for kind, named in declared.items():
        tracer.declare(kind.replace("_", " "), named)
    with tracer:
        value = loss()
        tracer.reached("loss", [("loss", value.detach())])
        if value.requires_grad:
            with tracer.phase("backward"):
                value.backward()
        tracer.reached("gradient", [(name, leaf.grad) for name, leaf in leaves if leaf.grad is not None])
        tracer.reached("buffer", list(model.named_buffers()) if model is not None else [])
    assert tracer.trace.problems == ()
    return tracer.trace


def line_marked(mark: str) -> int:
    """Number of the one line of this file that ends with the comment."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    [number] = [number for number, line in enumerate(lines, 1) if line.endswith(f"# {mark}")]
    return number


def leaf(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


class Applied(nn.Module):
    """``body`` wraps the function as ``body.0``; its line is the function's own."""

    def __init__(self, function: Callable[[Tensor], Tensor], weight: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3) if weight is None else weight)
        self.body = nn.Sequential(_Function(function))

    def forward(self) -> Tensor:
        return self.body(self.weight * 1.0).sum()


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: Tensor) -> Tensor:
        return self.function(value)  # mark: infinite gradient


# Births in the forward pass.

FORWARD_BIRTHS = {
    "log of zero": ("aten::log", lambda x: x.log()),  # mark: log of zero
    "overflow of exp": ("aten::exp", lambda x: (x + 1e3).exp()),  # mark: overflow of exp
    "zero by zero": ("aten::div", lambda x: x / x),  # mark: zero by zero
    "half overflow": ("aten::_to_copy", lambda x: (x + 1e5).half().float()),  # mark: half overflow
    "negative root": ("aten::sqrt", lambda x: (x - 1).sqrt()),  # mark: negative root
    "in place": ("aten::div_", lambda x: (x + 1).div_(0)),  # mark: in place
}


@pytest.mark.parametrize("name", FORWARD_BIRTHS)
def test_forward_birth_has_its_op_module_and_line(name: str):
    op, function = FORWARD_BIRTHS[name]
    model = Applied(function)

    offender = traced(model, model).first_offender

    assert isinstance(offender, OpRecord)
    assert (offender.op, offender.kind, offender.phase, offender.module) == (op, "birth", "forward", "body.0")
    assert (offender.source.file, offender.source.line) == (__file__, line_marked(f"mark: {name}"))
    assert offender.source.text.endswith(f"# mark: {name}")


def test_what_follows_a_birth_propagates_and_is_no_offender():
    trace = traced(lambda: (torch.zeros(2).log() * 2 + 1).sum())

    assert [(record.op, record.kind) for record in trace.ops] == [
        ("aten::log", "birth"),
        ("aten::mul", "propagate"),
        ("aten::add", "propagate"),
        ("aten::sum", "propagate"),
    ]
    [sink] = trace.sinks
    assert (sink.kind, sink.births) == ("loss", (trace.ops[0].index,))


def test_nan_made_of_infinities_leads_back_to_the_overflow():
    trace = traced(lambda: (lambda big: big - big)(leaf(1e38) * 1e3).sum())

    assert trace.first_offender.op == "aten::mul"
    [nan] = [record for record in trace.ops if record.op == "aten::sub"]
    assert (nan.kind, nan.ingredients) == ("birth", (trace.first_offender.index,))


# Births in the backward pass.


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value * 2

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient / 0


def eigenvectors(x: Tensor) -> Tensor:
    return torch.linalg.eigh(torch.diag(x + 1)).eigenvectors.abs()  # mark: tied eigenvectors


BACKWARD_BIRTHS = {
    "root at zero": ("aten::sqrt", lambda x: x.sqrt()),  # mark: root at zero
    "untaken branch": ("aten::log", lambda x: torch.where(x > 0, x.log(), 0.0)),  # mark: untaken branch
    "tied eigenvectors": ("aten::_linalg_eigh", eigenvectors),
    "infinite gradient": ("_InfiniteGradient", _InfiniteGradient.apply),
    "root of a square": ("aten::sqrt", lambda x: x.square().sum().sqrt()),  # mark: root of a square
}


@pytest.mark.parametrize("name", BACKWARD_BIRTHS)
def test_backward_birth_belongs_to_the_forward_line_and_module(name: str):
    forward_op, function = BACKWARD_BIRTHS[name]
    model = Applied(function)

    trace = traced(model, model)

    offender = trace.first_offender
    assert isinstance(offender, OpRecord)
    assert (offender.phase, offender.forward_op, offender.module) == ("backward", forward_op, "body.0")
    assert (offender.source.file, offender.source.line) == (__file__, line_marked(f"mark: {name}"))
    assert offender.forward_index < offender.index
    assert {sink.kind for sink in trace.sinks} == {"gradient"}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_backward_birth_in_a_checkpointed_module_belongs_to_its_line(use_reentrant: bool):
    inner = _Function(lambda x: x.sqrt())  # mark: checkpointed root
    model = Applied(lambda x: checkpoint(inner, x, use_reentrant=use_reentrant))
    model.inner = inner

    offender = traced(model, model).first_offender

    assert (offender.module, offender.forward_op) == ("inner", "aten::sqrt")
    assert offender.source.line == line_marked("mark: checkpointed root")


def test_recomputed_forward_is_said_to_be_recomputed():
    inner = _Function(lambda x: torch.where(x > 0, x.log(), 0.0))
    model = Applied(lambda x: checkpoint(inner, x, use_reentrant=False))
    model.inner = inner

    logs = [record for record in traced(model, model).ops if record.op == "aten::log"]

    assert [(record.recomputed, record.phase, record.module) for record in logs] == [
        (False, "forward", "inner"),
        (True, "forward", "inner"),
    ]


def test_gradient_taken_inside_a_forward_belongs_to_the_line_it_differentiates():
    def slope(x: Tensor) -> Tensor:
        energy = x.sqrt().sum()  # mark: energy
        return torch.autograd.grad(energy, x, create_graph=True)[0]

    model = Applied(slope)

    offender = traced(model, model).first_offender

    assert (offender.phase, offender.forward_op, offender.recomputed) == ("backward", "aten::sqrt", False)
    assert (offender.module, offender.source.line) == ("body.0", line_marked("mark: energy"))


def test_birth_where_a_gradient_is_differentiated_belongs_to_the_forward_line():
    x = leaf(0.0)

    def penalty() -> Tensor:
        value = x.abs().pow(1.5).sum()  # mark: penalised
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        return gradient.sum()

    offender = traced(penalty, leaves=[("x", x)]).first_offender

    assert offender.source.line == line_marked("mark: penalised")


def test_overflow_where_two_gradients_meet_is_found():
    x = leaf(1e-30)

    def loss() -> Tensor:
        shared = x * 1
        return (shared * 3e38 + shared * 3e38).sum()

    trace = traced(loss, leaves=[("x", x)])

    assert (trace.first_offender.op, trace.first_offender.phase) == ("aten::add", "backward")


# What is no fault.


def attention(x: Tensor) -> Tensor:
    scores = x[:, None] * x[None, :]
    mask = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(mask, -INF).softmax(dim=-1) @ x


def beam_search(x: Tensor) -> Tensor:
    beams = torch.full((3, 3), -INF)
    beams[0] = x.detach().log_softmax(-1)
    best = beams.reshape(-1).topk(2).indices
    return x[best % 3]


def masked_targets(x: Tensor) -> Tensor:
    targets = torch.tensor([1.0, NAN, 2.0])
    known = ~targets.isnan()
    return (x[known] - targets[known]).square()


NO_FAULTS = {
    "attention mask": attention,
    "scaled dot product attention": lambda x: nn.functional.scaled_dot_product_attention(
        x.repeat(1, 1, 3, 2), x.repeat(1, 1, 3, 2), x.repeat(1, 1, 3, 2), is_causal=True
    ),
    "beam search": beam_search,
    "masked-out targets": masked_targets,
    "nanmean of labels": lambda x: x * torch.tensor([1.0, NAN, 3.0]).nanmean(),
    "max pooling": lambda x: nn.functional.max_pool1d(x[None], 3, stride=1, padding=1),
    "log-mask": lambda x: (x + torch.tensor([1.0, 0.0, 1.0]).log()).softmax(-1),
    "clamped overflow": lambda x: (x.detach() + 1e5).half().clamp(max=1e4).float() * x,
    "lowest so far": lambda x: torch.minimum(torch.full_like(x, INF), x),
    "logsumexp of a mask": lambda x: x.masked_fill(torch.tensor([True, False, False]), -INF).logsumexp(-1),
    "uninitialised and overwritten": lambda x: torch.empty(3).fill_(NAN).copy_(x.detach()) * x,
}


@pytest.mark.parametrize("name", NO_FAULTS)
def test_what_reaches_neither_loss_nor_gradient_is_no_fault(name: str):
    model = Applied(NO_FAULTS[name], torch.tensor([1.0, 2.0, 3.0]))

    trace = traced(model, model)

    assert bool(model.weight.grad.isfinite().all())
    assert (trace.first_offender, trace.sinks) == (None, ())


def test_buffers_that_are_infinite_on_purpose_are_no_fault():
    model = Applied(lambda x: (x + model.causal).softmax(-1) * (x < model.lowest), torch.ones(3))
    model.register_buffer("causal", torch.tensor([0.0, 0.0, -INF]))
    model.register_buffer("lowest", torch.tensor(INF))

    trace = traced(model, model, buffer=model.named_buffers())

    assert [source.name for source in trace.sources] == ["causal", "lowest"]
    assert trace.first_offender is None


def test_a_mask_buffer_does_not_hide_the_offender():
    model = Applied(lambda x: (x.log() + model.causal).softmax(-1))
    model.register_buffer("causal", torch.tensor([0.0, 0.0, -INF]))

    assert traced(model, model, buffer=model.named_buffers()).first_offender.op == "aten::log"


MASKS = {
    "masked_fill": lambda x: x.masked_fill(torch.ones(3, dtype=torch.bool), -INF),
    "constant": lambda x: x + torch.full((3,), -INF),
    "tensor": lambda x: x + torch.tensor([-INF, -INF, -INF]),
    "log-mask": lambda x: x + torch.zeros(3).log(),
}


@pytest.mark.parametrize("name", MASKS)
def test_softmax_and_not_its_mask_is_the_offender_in_a_fully_masked_row(name: str):
    model = Applied(lambda x: MASKS[name](x).softmax(-1))

    trace = traced(model, model)

    assert trace.first_offender.op == "aten::_softmax"
    assert len(trace.first_offender.ingredients) == 1


def test_log_of_a_one_hot_target_is_the_offender_where_it_is_multiplied():
    target = torch.tensor([1.0, 0.0, 0.0])

    assert traced(lambda: (target * target.log()).sum()).first_offender.op == "aten::log"


def test_a_mask_that_reaches_the_loss_by_itself_is_the_offender():
    offender = traced(lambda: torch.zeros(2).masked_fill(torch.tensor([True, False]), -INF).sum()).first_offender

    assert (offender.op, offender.deliberate) == ("aten::masked_fill", True)


def test_multiplying_by_an_infinite_number_excuses_no_nan():
    offender = traced(lambda: (torch.zeros(2) * INF).sum()).first_offender

    assert (offender.op, offender.deliberate) == ("aten::mul", False)


# How values travel.


def test_nan_written_through_one_view_is_followed_through_another():
    def loss() -> Tensor:
        memory = torch.zeros(2, 3)
        memory[0, :1].div_(0)  # mark: through a view
        return memory.view(-1)[0] * 2

    offender = traced(loss).first_offender

    assert (offender.op, offender.source.line) == ("aten::div_", line_marked("mark: through a view"))


def test_finite_part_of_tainted_memory_is_no_fault():
    def loss() -> Tensor:
        memory = torch.zeros(2, 3)
        memory[0].div_(0)
        return memory[1].sum()

    assert traced(loss).first_offender is None


def test_birth_in_the_finite_part_of_tainted_memory_is_its_own():
    def loss() -> Tensor:
        memory = torch.zeros(2, 3)
        memory[0].div_(0)
        return memory[1].log().sum()

    assert traced(loss).first_offender.op == "aten::log"


def test_birth_in_memory_that_was_overwritten_is_its_own():
    def loss() -> Tensor:
        memory = torch.zeros(2).log()
        memory.zero_()
        memory[:1].div_(0)
        return memory.sum()

    assert traced(loss).first_offender.op == "aten::div_"


def test_memory_that_was_overwritten_whole_is_clean():
    def loss() -> Tensor:
        memory = torch.zeros(3).log()
        memory.zero_()
        return memory.sum() + (torch.ones(3) / 0).sum()

    assert traced(loss).first_offender.op == "aten::div"


@pytest.mark.parametrize("before", [0.0, NAN])
def test_result_written_to_out_is_a_birth_whatever_was_there_before(before: float):
    result = torch.full((2,), before)

    offender = traced(lambda: torch.log(torch.zeros(2), out=result).sum()).first_offender

    assert isinstance(offender, OpRecord)
    assert (offender.op, offender.kind) == ("aten::log", "birth")


def test_foreach_operations_of_an_optimizer_are_followed():
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.Adam(weights, eps=0.0, foreach=True)
    weights[0].grad, weights[1].grad = torch.zeros(2), torch.ones(3)
    tracer = ExactTracer()

    with tracer:
        with tracer.phase("optimizer"):
            optimizer.step()
        tracer.reached("parameter", [(str(n), weight.detach()) for n, weight in enumerate(weights)])

    offender = tracer.trace.first_offender
    assert (offender.phase, offender.kind) == ("optimizer", "birth")
    assert offender.op.startswith("aten::_foreach_addcdiv_")
    assert [sink.name for sink in tracer.trace.sinks] == ["0"]


def test_batch_norm_statistics_are_followed_to_the_overflow():
    model = nn.BatchNorm1d(2)
    tracer = ExactTracer(model)
    tracer.declare("buffer", model.named_buffers())

    with tracer:
        model(torch.tensor([[1e30, 1.0], [-1e30, 2.0]]) * 1e10)
        tracer.reached("buffer", model.named_buffers())

    assert [sink.name for sink in tracer.trace.sinks] == ["running_mean", "running_var"]
    assert tracer.trace.first_offender.op == "aten::mul"


def test_uninitialised_memory_that_is_read_is_named_as_such():
    def loss() -> Tensor:
        fresh = torch.empty(4)
        # What the allocator may hand out, written where no operation is seen.
        fresh.numpy()[:] = NAN
        fresh[:2] = 1.0
        return fresh.sum()

    offender = traced(loss).first_offender

    assert isinstance(offender, StateSource)
    assert (offender.kind, offender.first_index) == ("uninitialised memory", (2,))


def test_uninitialised_memory_that_is_written_before_it_is_read_is_no_fault():
    def loss() -> Tensor:
        fresh = torch.empty(4)
        fresh.numpy()[:] = NAN
        fresh[:2] = 1.0
        fresh[2:] = 2.0
        return fresh.sum()

    trace = traced(loss)

    assert (trace.first_offender, trace.sources) == (None, ())


@pytest.mark.parametrize("kind", ["batch", "parameter", "buffer", "optimizer_state"])
def test_declared_state_that_is_non_finite_comes_before_anything_computed(kind: str):
    state = torch.tensor([[1.0, 2.0], [3.0, NAN]])

    trace = traced(lambda: (torch.zeros(2).log() + state).sum(), **{kind: [("it", state)]})

    offender = trace.first_offender
    assert isinstance(offender, StateSource)
    assert (offender.kind, offender.name, offender.first_index) == (kind.replace("_", " "), "it", (1, 1))


def test_constant_the_step_never_declared_is_a_source():
    constant = torch.tensor([NAN, 1.0])

    offender = traced(lambda: (constant * 2).sum()).first_offender

    assert isinstance(offender, StateSource)
    assert offender.kind == "constant"


def test_operation_that_refuses_its_values_leads_to_their_birth():
    tracer = ExactTracer()

    with tracer, pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(torch.eye(2) / torch.zeros(2))

    [sink] = tracer.trace.sinks
    assert sink.name == "refused by aten::_linalg_check_errors"
    assert tracer.trace.first_offender.op == "aten::div"


def test_error_that_has_nothing_to_do_with_values_is_no_sink():
    tracer = ExactTracer()

    with tracer, pytest.raises(RuntimeError, match="must match"):
        torch.zeros(2).log() + torch.zeros(3)

    assert (tracer.trace.sinks, tracer.trace.first_offender) == ((), None)


# Whatever a step may hold.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_nan_is_found_in_every_floating_type(dtype: torch.dtype):
    zeros = torch.zeros(2, 2, dtype=torch.float32)
    tracer = ExactTracer()

    with tracer:
        bad = (zeros / zeros).to(dtype)
        tracer.reached("loss", [("loss", bad)])

    assert tracer.trace.problems == ()
    assert tracer.trace.first_offender.op == "aten::div"
    assert tracer.trace.sinks[0].facts.num_nan == 4


ODD_TENSORS = {
    "integer": lambda: torch.arange(3) // 2,
    "boolean": lambda: torch.ones(3) > 0,
    "empty": lambda: torch.empty(0, 3) * 2,
    "0-dim": lambda: torch.tensor(1.0) + 1,
    "sparse": lambda: torch.eye(3).to_sparse() * 2,
    "empty sparse": lambda: torch.zeros(3, 3).to_sparse() * 2,
    "compressed sparse": lambda: torch.eye(3).to_sparse_csr() * 2,
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]) * 2,
    "meta": lambda: torch.ones(3, device="meta") * 2,
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8).dequantize(),
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj() + 1,
    "negative bit": lambda: torch.ones(3, dtype=torch.complex64).conj().imag + 1,
    "expanded": lambda: torch.ones(1).expand(5) * 2,
    "list in place": lambda: torch._foreach_add_([torch.ones(2), torch.ones(0)], 1.0),
}


@pytest.mark.filterwarnings("ignore:.*(in beta|in prototype|quantize).*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz.*:DeprecationWarning")
@pytest.mark.parametrize("name", ODD_TENSORS)
def test_tensors_of_every_kind_pass_through(name: str):
    trace = traced(lambda: (ODD_TENSORS[name](), torch.zeros(()))[1])

    assert trace.first_offender is None


def test_tensors_that_cannot_be_read_are_counted():
    trace = traced(lambda: (torch.ones(3, device="meta") * 2, torch.zeros(()))[1])

    assert [kind for kind, _ in trace.skipped] == ["meta tensor"]


def test_sparse_gradient_is_followed():
    table = nn.Embedding(3, 2, sparse=True)

    trace = traced(lambda: (table(torch.tensor([1])) * 0).sqrt().sum(), table)

    assert [sink.name for sink in trace.sinks] == ["weight"]
    assert trace.first_offender.forward_op == "aten::sqrt"


# The tracer itself.


def test_failure_of_the_tracer_is_a_problem_and_not_a_crash(monkeypatch: pytest.MonkeyPatch):
    def broken(*args: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(exact, "tensors_in", broken)
    tracer = ExactTracer()

    with tracer:
        total = (torch.zeros(2) / 0).sum()

    assert math.isnan(total.item())
    assert tracer.trace.problems[0] == "ValueError while looking at an operation: no such thing"


def test_number_of_problems_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exact, "tensors_in", lambda *args: 1 / 0)
    tracer = ExactTracer()

    with tracer:
        for _ in range(50):
            torch.zeros(1) / 0

    assert len(tracer.trace.problems) == 20


def test_records_are_bounded_and_the_rest_is_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal, "MAX_RECORDS", 10)
    tracer = ExactTracer()

    with tracer:
        value = torch.zeros(1).log()
        for _ in range(30):
            value = value * 2

    trace = tracer.trace
    assert len(trace.ops) + trace.num_dropped == 31
    assert len(trace.ops) <= 10
    assert trace.ops[0].kind == "birth"


def test_a_late_birth_is_kept_when_what_passes_on_fills_the_records(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal, "MAX_RECORDS", 10)

    def loss() -> Tensor:
        mask = torch.full((2,), -INF)
        for _ in range(30):
            mask = mask * 2
        return (torch.zeros(2) / 0).sum()

    assert traced(loss).first_offender.op == "aten::div"


def test_tracer_keeps_no_tensor_alive():
    tracer = ExactTracer()
    with tracer:
        value = torch.zeros(3).log()
        held = weakref.ref(value)
        del value
        gc.collect()
        assert held() is None


def test_memory_that_is_gone_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exact, "_PURGE_EVERY", 50)
    tracer = ExactTracer()

    with tracer:
        for _ in range(200):
            torch.zeros(3).log()

    assert len(tracer.ledger.memory.tainted) <= 52


def test_reused_address_is_not_taken_for_the_old_memory():
    def loss() -> Tensor:
        for _ in range(20):
            torch.zeros(1000).log()
        return torch.ones(1000).mul(2).sum()

    trace = traced(loss)

    assert (trace.first_offender, trace.num_ops) == (None, 44)


def test_looks_between_the_operations_are_not_traced():
    tracer, bad = ExactTracer(), leaf(NAN)

    with tracer:
        tracer.declare("batch", [("x", bad)])
        tracer.reached("loss", [("loss", bad)])

    assert tracer.trace.num_ops == 0
    assert tracer.trace.first_offender.name == "x"


def test_focus_keeps_the_values_as_they_were_before_an_operation_in_place():
    tracer = ExactTracer(focus=[1])

    with pytest.raises(FocusReached), tracer:
        torch.zeros(2).div_(0).add_(1)

    kept = tracer.focused[1]
    assert tracer.trace.num_ops == 2
    assert kept.op == "aten::div_"
    assert kept.args[0].tolist() == [0.0, 0.0]
    assert kept.outputs[0].isnan().all()


def test_result_of_outside_work_holds_what_was_born_before_it():
    tracer = ExactTracer()

    with tracer:
        output = torch.zeros(2).log()
        gradient = torch.full((2,), NAN)
        tracer.declare_result("gradient of output 0", gradient, [output])
        tracer.reached("gradient", [("x", gradient * 2)])

    assert tracer.trace.first_offender.op == "aten::log"


def test_result_of_outside_work_on_finite_values_is_a_source():
    tracer = ExactTracer()

    with tracer:
        output = torch.zeros(2) + 1
        gradient = torch.full((2,), 1.0)
        gradient.numpy()[:] = NAN
        tracer.declare_result("gradient of output 0", gradient, [output])
        tracer.reached("gradient", [("x", gradient * 2)])

    assert tracer.trace.first_offender.name == "gradient of output 0"


def test_mask_in_the_outputs_does_not_excuse_a_non_finite_gradient():
    tracer = ExactTracer()

    with tracer:
        output = torch.zeros(2).masked_fill(torch.tensor([True, False]), -INF)
        gradient = torch.ones(2)
        gradient.numpy()[:] = NAN
        tracer.declare_result("gradient of output 0", gradient, [output])
        tracer.reached("gradient", [("x", gradient * 2)])

    assert tracer.trace.first_offender.name == "gradient of output 0"


def test_every_marked_line_is_marked_once():
    source = inspect.getsource(inspect.getmodule(line_marked))

    for name in FORWARD_BIRTHS:
        assert source.count(f"  # mark: {name}\n") == 1
