"""What the sentinel keeps of a step: the buffers by the names that ``named_buffers`` gives, and tensors in order."""

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nanhunt.capture.kept import Buffers, _tensors


def expected(model: nn.Module) -> dict[str, list[float]]:
    return {name: buffer.tolist() for name, buffer in model.named_buffers()}


def copied(buffers: Buffers) -> dict[str, list[float]]:
    return {name: buffer.tolist() for name, buffer in buffers.copies().items()}


@pytest.fixture
def model() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    model.register_buffer("mask", torch.ones(2))
    model.register_buffer("absent", None)
    return model


def test_copies_have_the_names_and_values_of_named_buffers(model: nn.Module):
    assert list(copied(Buffers(model))) == list(expected(model))
    assert copied(Buffers(model)) == expected(model)


def test_copies_do_not_move_with_the_buffers(model: nn.Module):
    copies = Buffers(model).copies()
    model.mask.add_(1)
    assert copies["mask"].tolist() == [1.0, 1.0]


def replace_buffer(model: Any) -> None:
    model.mask = torch.full((2,), 5.0)


def fill_buffer(model: Any) -> None:
    model.absent = torch.full((2,), 6.0)


def share_buffer(model: Any) -> None:
    model[1][1].running_mean = model[0].running_mean


CHANGES = {
    "value": lambda model: model.mask.mul_(3),
    "replaced": replace_buffer,
    "filled": fill_buffer,
    "shared": share_buffer,
    "added": lambda model: model[1][0].register_buffer("scale", torch.ones(1)),
    "deleted": lambda model: delattr(model, "mask"),
    "module added": lambda model: model.append(nn.BatchNorm1d(3)),
    "module deeper added": lambda model: model[1].append(nn.BatchNorm1d(3)),
    "module replaced": lambda model: model.__setitem__(0, nn.BatchNorm1d(3)),
    "module removed": lambda model: model.__delitem__(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model_are_followed(change: str, model: nn.Module):
    buffers = Buffers(model)
    buffers.copies()
    CHANGES[change](model)
    assert copied(buffers) == expected(model)


Pair = namedtuple("Pair", "left right")


def test_tensors_come_in_the_order_of_tree_leaves():
    a, b, c, d = (torch.tensor(float(number)) for number in range(4))
    for values in (a, (b, a), [a, None, (c, 1)], {"z": a, "b": [c, {"x": d}]}, Pair(c, (a, b)), OrderedDict(z=a, a=b)):
        shown = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        assert [id(tensor) for tensor in _tensors(values)] == [id(tensor) for tensor in shown]
