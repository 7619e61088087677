"""What ``nanhunt.trace`` takes: outputs that count as harm or not, several optimizers, and what it refuses."""

import math
from collections.abc import Callable

import pytest
import torch
from small_loops import facts, length, linear, rows, sgd, traced, train
from torch import Tensor, nn

import nanhunt
from nanhunt.findings import Report


class Negative(nn.Module):
    """A model whose output is -inf on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.linear(x)
        return hidden, (hidden * 0).log()


def evaluate(model: nn.Module) -> None:
    with torch.no_grad():
        model.eval()(rows())


def train_on_the_first_output(model: nn.Module) -> None:
    optimizer = sgd(model)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(rows())[0].square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("outputs", "loop", "is_fault"),
    [
        ("auto", evaluate, True),
        ("always", evaluate, True),
        ("never", evaluate, False),
        ("auto", train_on_the_first_output, False),
        ("always", train_on_the_first_output, True),
        ("never", train_on_the_first_output, False),
    ],
)
def test_outputs_says_where_an_output_of_the_model_is_harm(outputs: str, loop: Callable, is_fault: bool):
    model = Negative()

    first = traced(lambda: loop(model), model, outputs=outputs).first

    assert (first is not None) == is_fault
    assert first is None or (first.location.op, first.location.phase) == ("aten::log", "forward")


@pytest.mark.parametrize("outputs", ["sometimes", "", None, True])
def test_outputs_of_another_name_are_refused(outputs: object):
    with pytest.raises(ValueError, match="outputs is 'auto', 'always' or 'never', not"):
        nanhunt.trace(linear(), outputs=outputs)


@pytest.mark.parametrize("optimizer", [3, "sgd", nn.Linear(1, 1), [nn.Linear(1, 1)]])
def test_an_optimizer_that_is_none_is_refused(optimizer: object):
    with pytest.raises(TypeError, match="optimizer is a torch optimizer or a list of them, not "):
        nanhunt.trace(linear(), optimizer)


@pytest.mark.parametrize("kind", [list, tuple])
def test_of_several_optimizers_the_first_counts_the_steps(kind: type):
    model = nn.ModuleDict({"often": linear(), "seldom": linear()})
    often, seldom = sgd(model["often"]), sgd(model["seldom"])

    def loop() -> None:
        for number in range(6):
            often.zero_grad()
            length(model["often"], rows()).backward()
            often.step()
            if number % 2:
                seldom.zero_grad()
                length(model["seldom"], rows(is_bad=number == 5)).backward()
                seldom.step()

    assert steps_of(traced(loop, model, kind([often, seldom]))) == ("6", 6)


def steps_of(report: Report) -> tuple[str, int | None]:
    return facts(report)["steps"], report.first.location.step


def test_non_finite_state_of_any_of_several_optimizers_is_named():
    model = nn.ModuleDict({"one": linear(), "two": linear()})
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in model.values()]
    train(model["two"], optimizers[1], [False])
    optimizers[1].state[model["two"].weight]["exp_avg"][0, 0] = math.nan

    def loop() -> None:
        for part, optimizer in zip(model.values(), optimizers, strict=True):
            train(part, optimizer, [False])

    where = traced(loop, model, optimizers).first.location

    assert (where.phase, where.op) == ("optimizer", "")
    assert "exp_avg" in where.tensor
