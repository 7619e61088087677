"""The batch with one of its samples replaced by a control sample.

Replaced rather than dropped: a smaller batch takes other kernels and rounds otherwise, which alone can undo a fault
that hangs on the last bit.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nanhunt.capture.format import tensor_paths
from nanhunt.capture.step import Batches, Change
from nanhunt.experiments.changes import Diagnosis
from nanhunt.findings import Skip

MAX_SAMPLES = 16
"""Samples tried one by one."""


def changes(diagnosis: Diagnosis) -> Iterator[Change | Skip]:
    """One experiment per sample of a single batch, and one for all samples with a flat row."""
    batches = diagnosis.capture.batches
    size = batch_size(batches[0]) if len(batches) == 1 else 0
    if size == 0:
        reasons = {0: "no batch is replayed, only the model's own inputs", 1: "the batch has no common first dimension"}
        yield Skip("samples replaced one by one", reasons.get(len(batches), "the step has several micro-batches"))
        return
    if not diagnosis.control or batch_size(diagnosis.control[0]) < size:
        yield Skip("samples replaced one by one", "there is no control batch of the same size")
        return
    flat = [sample for sample in range(size) if num_flat_rows(batches[0], sample)]
    if len(flat) > 1:
        named = ", ".join(str(sample) for sample in flat)
        yield _replacement("without-flat-samples", f"samples {named} (with flat rows) replaced", diagnosis, flat)
    for sample in range(min(size, MAX_SAMPLES)):
        rows = num_flat_rows(batches[0], sample)
        kind = f"sample {sample}, with {rows} flat rows," if rows else f"sample {sample}"
        yield _replacement(f"replace-sample-{sample}", f"{kind} replaced", diagnosis, [sample])
    if size > MAX_SAMPLES:
        yield Skip(f"samples {MAX_SAMPLES} to {size - 1} replaced", f"only the first {MAX_SAMPLES} are tried")


def batch_size(batch: Any) -> int:
    """The common first dimension of the batch's tensors; 0 if there is none."""
    sizes = {tensor.shape[0] if tensor.dim() else 0 for _, tensor in tensor_paths(batch)}
    return sizes.pop() if len(sizes) == 1 else 0


def num_flat_rows(batch: Any, sample: int) -> int:
    """Rows (channels) of a sample's signals that are one constant for at least a tenth of their length."""
    flat = 0
    for _, tensor in tensor_paths(batch):
        if tensor.dim() < 3 or not tensor.is_floating_point() or tensor.shape[-1] < 20:
            continue
        rows = tensor[sample].reshape(-1, tensor.shape[-1])
        # A run of equal neighbours as long as a tenth of the row is no signal.
        still = (rows.diff(dim=-1) == 0).to(torch.float32)
        length = max(1, rows.shape[-1] // 10)
        share = torch.nn.functional.avg_pool1d(still[:, None], length, stride=1)
        flat += int((share == 1).any(dim=-1).sum())
    return flat


def _replacement(name: str, title: str, diagnosis: Diagnosis, samples: list[int]) -> Change:
    return Change(name, f"{title} by a control sample", "data", batches=_replacer(diagnosis.control[0], samples))


def _replacer(control: Any, samples: list[int]) -> Callable[[Batches], Batches]:
    return lambda batches: [_replaced(batches[0], control, samples)]


def _replaced(batch: Any, control: Any, samples: list[int]) -> Any:
    if isinstance(batch, Tensor):
        values = batch.clone()
        values[samples] = control[samples]
        return values
    if isinstance(batch, Mapping):
        return {key: _replaced(value, control[key], samples) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_replaced(one, other, samples) for one, other in zip(batch, control, strict=False))
    return batch
