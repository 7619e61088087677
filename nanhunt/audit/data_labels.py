"""What an audit counts of labels."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanhunt.records.data_audit import LabelAudit

IGNORED = -100
MAX_CLASSES = 1000


@dataclass
class LabelLook:
    """Labels over the batches; call it with each, then ask for the ``record``."""

    name: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    counts: Counter[int] = field(default_factory=Counter)
    is_classes: bool = True
    num_samples: int = 0
    num_labels: int = 0
    num_ignored: int = 0
    num_nonfinite: int = 0
    num_distributions: int = 0
    num_rows: int = 0
    sums: list[float] = field(default_factory=list)
    all_ignored: list[int] = field(default_factory=list)

    def __call__(self, labels: Tensor, batch: int) -> None:
        """Counts the labels of one batch."""
        self.dtype = self.dtype or str(labels.dtype).removeprefix("torch.")
        self.shape = self.shape or tuple(labels.shape)
        self.num_samples += labels.shape[0] if labels.dim() else 1
        if labels.is_floating_point():
            self._see_floats(labels)
            return
        kept = labels[labels != IGNORED].long()
        self.num_ignored += labels.numel() - kept.numel()
        if labels.numel() and not kept.numel():
            self.all_ignored.append(batch)
        self._count(kept)

    def _see_floats(self, labels: Tensor) -> None:
        finite = labels[torch.isfinite(labels)]
        self.num_nonfinite += labels.numel() - finite.numel()
        # Classes are often kept as floats, for a loss that wants them so.
        if bool(((finite == 0) | (finite == 1)).all()):
            self._count(finite.long())
        else:
            self.is_classes = False
        if labels.dim() == 2 and labels.shape[1] > 1 and bool(((finite >= 0) & (finite <= 1)).all()):
            sums = labels.double().sum(1)
            self.num_rows += len(sums)
            self.num_distributions += int(((sums - 1).abs() < 1e-2).sum())
            self.sums += [float(sums.min()), float(sums.max())]

    def _count(self, kept: Tensor) -> None:
        self.num_labels += kept.numel()
        values, numbers = kept.unique(return_counts=True)
        self.counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
        self.is_classes = self.is_classes and len(self.counts) <= MAX_CLASSES

    def record(self) -> LabelAudit:
        """What was counted."""
        return LabelAudit(
            name=self.name,
            dtype=self.dtype,
            shape=self.shape,
            num_samples=self.num_samples,
            num_labels=self.num_labels,
            num_ignored=self.num_ignored,
            num_nonfinite=self.num_nonfinite,
            counts=dict(sorted(self.counts.items())) if self.is_classes else {},
            num_distributions=self.num_distributions,
            num_rows=self.num_rows,
            sums=(min(self.sums), max(self.sums)) if self.sums else (1.0, 1.0),
            all_ignored=tuple(self.all_ignored),
        )
