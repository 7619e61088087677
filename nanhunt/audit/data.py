"""``audit-data``: what the batches hold, before a model sees them."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from nanhunt.audit.data_batches import MAX_BATCHES, batches_of, take_apart
from nanhunt.audit.data_labels import LabelLook
from nanhunt.audit.data_tensors import TensorLook
from nanhunt.audit.init_passes import kept_rng
from nanhunt.audit.report import report_of
from nanhunt.audit.subject import Subject
from nanhunt.errors import NanhuntError
from nanhunt.findings import DataTable, Report, Skip
from nanhunt.numerics import count
from nanhunt.records.data_audit import DataAudit, LabelAudit, TensorAudit

NUM_MADE = 8
"""Batches asked of a target that makes its own."""

Progress = Callable[[str], None]


def audit_data(
    batches: Any, labels: str | int | None = None, *, progress: Progress = lambda what: None, name: str = "the batches"
) -> Report:
    """What is remarkable in a batch, or in the first batches of an iterable: samples, channels and labels.

    The batches are only read; the random generators of the program are put back after an iterable has drawn from them.

    Args:
        batches: One batch (a tensor, mapping, tuple, list of tensors or dataclass), or an iterable of batches, such as
            a data loader, of which the first 50 are looked at.
        labels: Key, field or place of the labels; None for one of the usual names (``labels``, ``label``, ``targets``,
            ``target``, ``y``), else the second of a pair.
        progress: Called with what is being looked at.
        name: What the report calls it.

    Raises:
        NanhuntError: If there is no batch, it holds no tensor, or it has no such labels.
    """
    with kept_rng():
        return _audit(name, batches_of(batches), labels, progress)


def audit_subject(subject: Subject, progress: Progress) -> Report:
    """The audit of what a command line names: the captured batches, else some that the target makes.

    Raises:
        NanhuntError: If there is neither.
    """
    capture = subject.stored.capture if subject.stored is not None else None
    if capture is not None and capture.batches:
        return audit_data(list(capture.batches), progress=progress, name=subject.name)
    with kept_rng():
        target = subject.target
        seeds = range(subject.seed, subject.seed + NUM_MADE)
        made = [] if target is None else [target.control_batch(seed) for seed in seeds]
    return audit_data([batch for batch in made if batch is not None], progress=progress, name=subject.name)


def _audit(name: str, batches: Iterable[Any], labels: str | int | None, progress: Progress) -> Report:
    started = time.perf_counter()
    looks: dict[str, TensorLook] = {}
    label_look: LabelLook | None = None
    others: dict[str, str] = {}
    unread: dict[str, str] = {}
    num_batches = 0
    for batch in batches:
        progress(f"batch {num_batches + 1}, of at most {MAX_BATCHES}")
        tensors, label_name, left_out = take_apart(batch, labels)
        unread |= left_out
        for key, tensor in tensors.items():
            if key == label_name:
                label_look = label_look or LabelLook(key)
                label_look(tensor.cpu(), num_batches)
            elif tensor.is_floating_point():
                looks.setdefault(key, TensorLook(key))(_readable(tensor), num_batches)
            else:
                others[key] = str(tensor.dtype).removeprefix("torch.")
        num_batches += 1
    if not num_batches:
        raise NanhuntError("no batch to look at", help="give a capture, or a target with control_batch(seed)")
    found = tuple(look.record() for look in looks.values())
    audit = DataAudit(num_batches, found, label_look.record() if label_look else None, has_lengths=bool(others))
    return report_of(
        f"audit-data of {name}",
        [audit],
        facts=[("batches", f"{num_batches}")],
        tables=_tables(audit),
        skips=[*_skips(audit, others), *(Skip(key, f"it is {why}") for key, why in unread.items())],
        seconds=time.perf_counter() - started,
    )


def _readable(tensor: Tensor) -> Tensor:
    """The tensor on this machine, in a type whose limits are known."""
    return tensor.cpu() if tensor.element_size() > 1 else tensor.cpu().float()


def _tables(audit: DataAudit) -> list[DataTable]:
    tables = []
    if audit.tensors:
        columns = ("tensor", "shape", "type", "lowest", "highest", "mean", "std", "padding")
        note = "padding: zeros at an end of a sample, in all channels alike" if _has_padding(audit) else ""
        tables.append(DataTable("inputs", columns, tuple(map(_tensor_row, audit.tensors)), note))
    if audit.labels is not None:
        headings = ("labels", "shape", "type", "ignored", "classes")
        tables.append(DataTable("labels", headings, (_label_row(audit.labels),)))
    return tables


def _has_padding(audit: DataAudit) -> bool:
    return any(tensor.padding_share > 0 for tensor in audit.tensors)


def _tensor_row(tensor: TensorAudit) -> tuple[object, ...]:
    numbers = (f"{value:.3g}" for value in (tensor.low, tensor.high, tensor.mean, tensor.std))
    return (tensor.name, _shape(tensor.shape), tensor.dtype, *numbers, f"{tensor.padding_share:.1%}")


def _label_row(labels: LabelAudit) -> tuple[object, ...]:
    classes = [f"{value}: {number:,}" for value, number in list(labels.counts.items())[:6]]
    more = [f"and {len(labels.counts) - 6} more"] if len(labels.counts) > 6 else []
    what = ", ".join([*classes, *more]) or "no classes"
    return (labels.name, _shape(labels.shape), labels.dtype, f"{labels.num_ignored:,}", what)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _skips(audit: DataAudit, others: dict[str, str]) -> list[Skip]:
    skips = [Skip(f"samples and channels of {one.name}", one.unjudged) for one in audit.tensors if one.unjudged]
    skips += [Skip(name, f"{dtype} values are no measurements") for name, dtype in others.items()]
    if audit.labels is None:
        skips.append(Skip("labels", f"nothing says which tensor of {count(audit.num_batches, 'batch', 'batches')}"))
    return skips
