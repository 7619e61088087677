"""Weight decay kept off biases and norms, chosen by substrings of names, as is often proposed against NaN."""

from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

from nanhunt.capture.step import Change
from nanhunt.experiments.changes import Diagnosis
from nanhunt.findings import Skip

_SUBSTRINGS = ("bias", "norm", "bn", "ln", "layernorm", "rmsnorm")


def changes(diagnosis: Diagnosis) -> Iterator[Change | Skip]:
    """One experiment where there is an optimizer."""
    if not diagnosis.target.has_optimizer:
        yield Skip("weight-decay groups", f"target {diagnosis.target.name} has no optimizer")
        return
    yield Change(
        "decay-groups", "no weight decay on norms and biases (groups by name)", "optimizer", optimizer=_regrouped
    )


def _regrouped(model: nn.Module, optimizer: Optimizer) -> Optimizer:
    """The same optimizer and state, each group split into a decayed and a spared part."""
    spared = {id(p) for name, p in model.named_parameters() if any(part in name.lower() for part in _SUBSTRINGS)}
    groups = []
    for group in optimizer.param_groups:
        for is_spared in (False, True):
            chosen = [parameter for parameter in group["params"] if (id(parameter) in spared) == is_spared]
            if chosen:
                decay = 0.0 if is_spared else group.get("weight_decay", 0.0)
                groups.append({**group, "params": chosen, "weight_decay": decay})
    optimizer.param_groups[:] = groups
    return optimizer
