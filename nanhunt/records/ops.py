"""Records of the exact tracer: operations, where non-finite values came from, and what they reached."""

from dataclasses import dataclass, field
from typing import Literal

from nanhunt.records.updates import OptimizerFacts

Phase = Literal["forward", "backward", "clip", "optimizer", "data", "weights"]


@dataclass(frozen=True)
class ValueFacts:
    """Counts over one tensor.

    Attributes:
        shape: Its shape.
        dtype: Its dtype, without the ``torch.`` prefix.
        num_nan: Elements that are NaN.
        num_posinf: Elements that are +inf.
        num_neginf: Elements that are -inf.
        abs_max: Largest finite magnitude, or None if no element is finite.
    """

    shape: tuple[int, ...]
    dtype: str
    num_nan: int = 0
    num_posinf: int = 0
    num_neginf: int = 0
    abs_max: float | None = None

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def num_nonfinite(self) -> int:
        """Elements that are NaN or infinite."""
        return self.num_nan + self.num_posinf + self.num_neginf

    @property
    def is_finite(self) -> bool:
        """Whether every element is finite."""
        return self.num_nonfinite == 0


@dataclass(frozen=True)
class SourceLine:
    """A line of the user's own code."""

    file: str
    line: int
    text: str = ""
    function: str = ""


@dataclass(frozen=True)
class OpRecord:
    """One operation that had to do with non-finite values.

    Attributes:
        index: Position in program order, from 0.
        op: Name such as ``aten::div_``.
        kind: ``birth``: an output is non-finite and the inputs do not explain it; ``propagate``: non-finite in and out;
            ``kill``: non-finite in, finite out.
        phase: Part of the step it ran in.
        module: Dotted path as in ``named_modules``; for a backward op that of the forward op it belongs to.
        source: The user's line; for a backward op the forward line that made it.
        forward_index: For a backward op, the index of the forward op it differentiates.
        forward_op: For a backward op, the name of that forward op.
        deliberate: Whether a non-finite constant was an argument, as in a -inf mask.
        outputs: Facts of each non-finite output of a birth; empty for the rest, which are counted only.
        ingredients: Indices of earlier births whose infinities went in.
        recomputed: Whether it ran while a checkpointed forward was recomputed.
        own_backward: The line it ran at, where an ``autograd.Function`` of the user's has a backward of its own.
        between: Whether it ran outside modules between a backward pass and the next forward pass, and on which side of
            the optimizer step.
        step: Optimizer step it ran in, as far as the observer counts them.
        micro_step: Part of an accumulated step.
    """

    index: int
    op: str
    kind: Literal["birth", "propagate", "kill"]
    phase: Phase
    module: str
    source: SourceLine | None
    forward_index: int | None = None
    forward_op: str | None = None
    deliberate: bool = False
    outputs: tuple[ValueFacts, ...] = ()
    ingredients: tuple[int, ...] = ()
    recomputed: bool = False
    own_backward: SourceLine | None = None
    between: Literal["", "before the step", "after the step"] = ""
    step: int = 0
    micro_step: int = 0


@dataclass(frozen=True)
class Spread:
    """How the non-finite elements of a tensor lie in it.

    Attributes:
        num_samples: Slices along the first dimension that hold one.
        num_whole_samples: Those of them that hold nothing else.
        whole_slices: Dimension and position of slices along another dimension that hold nothing else, such as a
            channel; the first few.
    """

    num_samples: int
    num_whole_samples: int = 0
    whole_slices: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class StateSource:
    """A tensor that was non-finite before any traced operation touched it.

    Attributes:
        index: A negative number that stands for it among the births; no operation has it.
        kind: What it is.
        name: Its name, such as ``batch.windows`` or ``encoder.0.weight``.
        facts: Counts.
        first_index: Position of its first non-finite element.
        module: Dotted path of the module that owns it; '' for what no module owns.
        source: The user's line that first read it, or that made memory nobody wrote; None if it was looked at before.
        op: The operation that made memory nobody wrote.
        found_at: Index of the operation that read it; -1 if it was looked at before.
        deliberate: Whether it looks like a mask: all of its non-finite values are -inf, and it is not data.
        step: Optimizer step it was found in.
        micro_step: Part of an accumulated step.
        phase: Part of the step it belongs to, where the kind does not say.
        spread: How its non-finite elements lie in a batch; None for the rest.
    """

    index: int
    kind: Literal[
        "batch",
        "parameter",
        "buffer",
        "module attribute",
        "optimizer state",
        "constant",
        "uninitialised memory",
        "output gradient",
        "collective",
    ]
    name: str
    facts: ValueFacts
    first_index: tuple[int, ...] = ()
    module: str = ""
    source: SourceLine | None = None
    op: str = ""
    found_at: int = -1
    deliberate: bool = False
    step: int = 0
    micro_step: int = 0
    phase: Phase | None = None
    spread: Spread | None = None


@dataclass(frozen=True)
class Sink:
    """A place where a non-finite value does harm, and the births that reached it."""

    kind: Literal["loss", "gradient", "parameter", "buffer", "optimizer state", "output"]
    name: str
    facts: ValueFacts
    births: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """The records of one exactly traced step.

    Attributes:
        num_ops: Operations seen.
        ops: Those that had to do with non-finite values, in program order.
        sources: Tensors that were non-finite from the start.
        sinks: Harmed places, in the order they were looked at.
        num_dropped: Records beyond the memory bound, counted only.
        skipped: Kinds of tensors that could not be looked at, with their number.
        problems: Failures of the tracer itself, one line each.
        updates: What the optimizers were doing.
    """

    num_ops: int
    ops: tuple[OpRecord, ...]
    sources: tuple[StateSource, ...] = ()
    sinks: tuple[Sink, ...] = ()
    num_dropped: int = 0
    skipped: tuple[tuple[str, int], ...] = ()
    problems: tuple[str, ...] = ()
    updates: OptimizerFacts = field(default_factory=OptimizerFacts)

    def op_at(self, index: int) -> OpRecord | None:
        """The record of the operation with this index."""
        return next((record for record in self.ops if record.index == index), None)

    @property
    def first_offender(self) -> OpRecord | StateSource | None:
        """The earliest birth or source from which a sink was reached; None if no sink was.

        A deliberate one counts only where nothing else reached a sink: a mask is an ingredient of the operation that
        could not take it. What was bad before a step explains more than anything the step computed; among several,
        the first looked at comes first.
        """
        reached = {birth for sink in self.sinks for birth in sink.births}
        deliberate = {source.index for source in self.sources if source.deliberate}
        deliberate |= {record.index for record in self.ops if record.deliberate}
        # A constant that is the whole of a non-finite loss is no mask.
        harmful = {
            b for sink in self.sinks if sink.kind == "loss" and deliberate.issuperset(sink.births) for b in sink.births
        }
        deliberate -= harmful
        found: list[tuple[tuple[bool, int, int, bool, int], OpRecord | StateSource]] = [
            # A source that is met by the operation that makes NaN of it goes before that operation.
            ((source.index in deliberate, source.step, source.found_at, False, -source.index), source)
            for source in self.sources
            if source.index in reached
        ]
        found += [
            ((record.index in deliberate, record.step, record.index, True, record.index), record)
            for record in self.ops
            if record.kind == "birth" and record.index in reached
        ]
        return min(found, key=lambda pair: pair[0])[1] if found else None
