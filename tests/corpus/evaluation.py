"""Evaluation: outputs of every kind, the number of the batch, and no backward pass that could tell."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from scenario import Loop, fault
from torch import Tensor, nn

LOG = ("aten::log",)


@fault("a dataclass as output", phase="forward", op=LOG, module="density", step=1)
def output_held_by_a_dataclass() -> Loop:
    @dataclass
    class Estimate:
        log_density: Tensor
        features: list[Tensor]

    class Density(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features.relu().sum(1).log()  # here

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.density = nn.Linear(4, 3, bias=False), Density()

        def forward(self, x: Tensor) -> Estimate:
            features = self.body(x)
            return Estimate(self.density(features), [features])

    torch.manual_seed(0)
    model = Model().eval()
    nn.init.uniform_(model.body.weight)

    def run() -> list[float]:
        scores = []
        with torch.no_grad():
            for step in range(3):
                x = torch.rand(5, 4) if step != 1 else torch.zeros(5, 4)
                scores.append(model(x).log_density.mean().item())
        return scores

    return Loop(model, run)


@fault("a plain object as output", phase="forward", op=("aten::div",), module="calibrate", step=2)
def output_held_by_a_plain_object() -> Loop:
    class Prediction:
        def __init__(self, probability: Tensor) -> None:
            self.probability = probability

    class Calibrate(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return scores / scores.sum(1, keepdim=True)  # here

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calibrate = nn.Linear(3, 4), Calibrate()

        def forward(self, x: Tensor) -> Prediction:
            return Prediction(self.calibrate((self.net(x) - 1).relu()))

    torch.manual_seed(1)
    model = Classifier().eval()
    nn.init.constant_(model.net.bias, 2.0)

    def run() -> None:
        with torch.inference_mode():
            for shift in (0.0, 0.0, -50.0, 0.0):
                nn.init.constant_(model.net.bias, 2.0 + shift)
                model(0.1 * torch.randn(4, 3)).probability.argmax(1)

    return Loop(model, run)


@fault("an ordered dictionary of its own class", phase="forward", op=("aten::logit",), module="head", step=2)
def output_in_an_ordered_dictionary_of_its_own_class() -> Loop:
    class Outputs(OrderedDict):
        """Keys in the order of the heads."""

    class Head(nn.Module):
        def forward(self, probability: Tensor) -> Tensor:
            return torch.logit(probability)  # here

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = nn.Linear(4, 1), Head()

        def forward(self, x: Tensor) -> Outputs:
            probability = self.net(x).sigmoid()
            return Outputs(probability=probability, out=self.head(probability))

    torch.manual_seed(2)
    model = Segmenter().eval()

    def run() -> None:
        with torch.no_grad():
            for gain in (1.0, 1.0, 1e5, 1.0):
                model(torch.randn(6, 4) * gain)["out"].mean()

    return Loop(model, run)


@fault(
    "a part alone is evaluated, its third batch is bad",
    phase="forward",
    op=("aten::rsqrt",),
    module="normalise",
    step=2,
)
def third_batch_of_a_part_that_is_evaluated_alone() -> Loop:
    class Normalise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.var(1, keepdim=True))  # here

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalise, self.head = Normalise(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.normalise(x))

    torch.manual_seed(4)
    model = Model().eval()
    batches = [torch.randn(3, 6) for _ in range(4)]
    batches[2][1] = 0.5

    def run() -> Tensor:
        with torch.no_grad():
            return torch.cat([model.normalise(batch) for batch in batches]).mean(0)

    return Loop(model, run)


@fault("validation between epochs, in training's own trace", phase="forward", op=("aten::div",), module="recall")
def validation_after_a_healthy_epoch() -> Loop:
    class Recall(nn.Module):
        def forward(self, logits: Tensor, label: Tensor) -> Tensor:
            hit = ((logits > 0) & (label > 0)).float().sum()
            return hit / label.sum()  # here

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.recall = nn.Linear(3, 1), Recall()

        def forward(self, x: Tensor, label: Tensor) -> dict[str, Tensor]:
            logits = self.net(x).squeeze(1)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, label)
            return {"loss": loss} if self.training else {"loss": loss, "recall": self.recall(logits, label)}

    torch.manual_seed(5)
    model = Detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for positive in (1.0, 0.0):
            model.train()
            for _ in range(2):
                loss = model(torch.randn(6, 3), torch.randint(2, (6,)).float())["loss"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                model(torch.randn(4, 3), torch.full((4,), positive))

    return Loop(model, run, optimizer)
