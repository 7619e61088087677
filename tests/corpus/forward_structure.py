"""Failures of the forward pass in the ways that code is put together: containers, views, hooks, custom operations."""

import collections
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn


@fault("log of an in-place view of clipped counts", phase="forward", op=("aten::log_",), module="stem", step=2)
def logarithm_written_through_a_view() -> Loop:
    torch.manual_seed(0)

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(6, 4)

        def forward(self, table: Tensor) -> Tensor:
            table = table.clone()
            counts = table[:, 3:]
            counts.log_()  # here
            return self.mix(table)

    model = nn.Sequential()
    model.add_module("stem", Stem())
    model.add_module("head", nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(4):
            table = torch.cat([torch.randn(8, 3), torch.randint(1, 9, (8, 3)).float()], dim=1)
            table[6, 4] *= step != 2
            loss = F.cross_entropy(model(table), torch.randint(0, 2, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("torch.log(x, out=buffer) of a count of 0", phase="forward", op=("aten::log",), module="scorer")
def logarithm_into_a_buffer_given_as_out() -> Loop:
    torch.manual_seed(0)

    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Linear(4, 1)
            self.register_buffer("scratch", torch.zeros(5, 4), persistent=False)

        def forward(self, counts: Tensor) -> Tensor:
            torch.log(counts, out=self.scratch)  # here
            return self.weights(self.scratch)

    class Ranker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scorer = Scorer()

        def forward(self, counts: Tensor) -> tuple[Tensor, Tensor]:
            return self.scorer(counts).squeeze(1).sort(descending=True)

    model = Ranker().eval()

    @torch.no_grad()
    def run() -> None:
        for smallest in (1, 2, 0):
            model(torch.arange(20).view(5, 4).float() + smallest)

    return Loop(model, run)


@fault("losses over initial losses, one of which is 0", phase="forward", op=("aten::_foreach_div",), module="", step=0)
def task_losses_normalised_all_at_once() -> Loop:
    torch.manual_seed(0)
    model = nn.ModuleDict({"trunk": nn.Linear(5, 8), "a": nn.Linear(8, 1), "b": nn.Linear(8, 1), "c": nn.Linear(8, 1)})
    nn.init.zeros_(model["c"].weight)
    nn.init.zeros_(model["c"].bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        initial = None
        for _ in range(3):
            hidden = torch.tanh(model["trunk"](torch.randn(16, 5)))
            losses = [model[task](hidden).abs().mean() for task in "abc"]
            initial = [loss.detach() for loss in losses] if initial is None else initial
            ratios = torch._foreach_div(losses, initial)  # here
            optimizer.zero_grad()
            torch.stack(ratios).sum().backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("scatter mean: in-place division by a count of 0", phase="forward", op=("aten::div_",), module="convs.1", step=2)
def message_passing_to_a_node_without_neighbours() -> Loop:
    torch.manual_seed(0)

    class Conv(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.own, self.neighbours = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            source, target = edges
            total = torch.zeros_like(x).index_add(0, target, x[source])
            count = torch.zeros(len(x), 1).index_add_(0, target, torch.ones(len(target), 1))
            total.div_(count)  # here
            return self.own(x) + self.neighbours(total)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([Conv(3, 8), Conv(8, 2)])

        def forward(self, x: Tensor, edges: Tensor, pruned: Tensor) -> Tensor:
            x = self.convs[0](x, edges).relu()
            return self.convs[1](x, pruned)

    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ring = torch.stack([torch.arange(6), (torch.arange(6) + 1) % 6])

    def run() -> None:
        for step in range(4):
            pruned = ring[:, 1:] if step == 2 else ring
            loss = F.cross_entropy(model(torch.randn(6, 3), ring, pruned), torch.randint(0, 2, (6,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("torch.empty, not wholly written", phase="forward", op=("aten::empty",), module="pack", step=1)
def memory_read_before_it_is_written() -> Loop:
    torch.manual_seed(0)

    class Pack(nn.Module):
        def forward(self, *, tokens: Tensor, lengths: list[int]) -> Tensor:
            packed = torch.empty(len(lengths), max(lengths), tokens.size(-1))  # here
            start = 0
            for row, length in enumerate(lengths):
                packed[row, :length] = tokens[start : start + length]
                start += length
            return packed

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pack, self.head = Pack(), nn.Linear(4, 2)

        def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
            return self.head(self.pack(tokens=tokens, lengths=lengths).mean(1))

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        was_deterministic = torch.are_deterministic_algorithms_enabled()
        # In this mode torch fills fresh memory with NaN, which makes certain what is otherwise chance.
        torch.use_deterministic_algorithms(True)
        try:
            for lengths in ([5, 5], [5, 3], [4, 4]):
                loss = F.cross_entropy(model(torch.randn(sum(lengths), 4), lengths), torch.tensor([0, 1]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        finally:
            torch.use_deterministic_algorithms(was_deterministic)

    return Loop(model, run, optimizer)


@fault("the second pass through one module divides 0 by 0", phase="forward", op=("aten::div",), module="refine", step=1)
def module_called_twice_fails_in_its_second_call() -> Loop:
    torch.manual_seed(0)

    @dataclass
    class Refined:
        boxes: Tensor
        confidence: Tensor

    class Refine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.delta = nn.Linear(4, 4)

        def forward(self, boxes: Tensor) -> Refined:
            size = boxes[:, 2:] - boxes[:, :2]
            aspect = size[:, :1] / size[:, 1:]  # here
            boxes = (boxes + 0.01 * self.delta(boxes)).clamp(0, 1)
            return Refined(boxes=boxes, confidence=aspect)

    class Cascade(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.refine, self.score = Refine(), nn.Linear(1, 1)

        def forward(self, boxes: Tensor) -> Refined:
            first = self.refine(boxes)
            second = self.refine(first.boxes)
            return Refined(second.boxes, self.score(first.confidence + second.confidence))

    model = Cascade()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(3):
            corner = torch.rand(4, 2) * 0.3 + 0.1
            boxes = torch.cat([corner, corner + 0.3], dim=1) + (2.0 if step == 1 else 0.0)
            output = model(boxes)
            loss = output.boxes.mean() + output.confidence.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("perplexity-weighted head on a tied embedding", phase="forward", op=("aten::exp",), module="", step=2)
def output_of_a_tied_embedding_in_an_ordered_dictionary() -> Loop:
    torch.manual_seed(0)

    @dataclass
    class ModelOutput(collections.OrderedDict):
        logits: Tensor
        hidden_states: tuple[Tensor, ...]

        def __post_init__(self) -> None:
            self.update({f.name: getattr(self, f.name) for f in fields(self)})

    class TiedModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.h, self.lm_head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
            self.lm_head.weight = self.wte.weight

        def forward(self, input_ids: Tensor, temperature: float = 1.0) -> ModelOutput:
            first = self.wte(input_ids)
            last = first + self.h(first).tanh()
            return ModelOutput(logits=self.lm_head(last) / temperature, hidden_states=(first, last))

        def training_step(self, batch: dict[str, Tensor | float]) -> Tensor:
            output = self(**batch)
            nll = F.cross_entropy(output["logits"][:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
            perplexity = torch.exp(nll)  # here
            return nll + 1e-3 * perplexity

    model = TiedModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for temperature in (1.0, 0.7, 0.005, 1.0):
            loss = model.training_step({"input_ids": torch.randint(0, 9, (2, 6)), "temperature": temperature})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("fast weights of an inner loop with lr 40", phase="forward", op=("aten::log",), module="density", step=1)
def functional_call_with_adapted_weights() -> Loop:
    torch.manual_seed(0)

    class Density(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.full((3,), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            return (self.rate.log() - self.rate * x).sum(-1)  # here

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.density = Density()

        def forward(self, x: Tensor) -> Tensor:
            return -self.density(x).mean()

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for inner_lr in (0.1, 40.0):
            support, query = torch.rand(8, 3) + 1, torch.rand(8, 3) + 1
            weights = dict(model.named_parameters())
            loss = torch.func.functional_call(model, weights, (support,))
            gradients = torch.autograd.grad(loss, list(weights.values()))
            adapted = {name: w - inner_lr * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
            outer = torch.func.functional_call(model, adapted, args=(), kwargs={"x": query})
            optimizer.zero_grad()
            outer.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("x / deviation of a constant, in numpy", phase="forward", op=("corpus::zscore",), module="1", step=2)
def custom_operation_returns_nan() -> Loop:
    torch.manual_seed(0)

    @torch.library.custom_op("corpus::zscore", mutates_args=())
    def zscore(x: Tensor) -> Tensor:
        values = x.detach().numpy()
        with np.errstate(invalid="ignore"):
            return torch.from_numpy((values - values.mean(0)) / values.std(0))

    zscore.register_autograd(lambda ctx, grad: grad)

    class Standardise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return zscore(x)  # here

    model = nn.Sequential(nn.Linear(3, 6), Standardise(), nn.ReLU(), nn.Linear(6, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(4):
            x = torch.randn(8, 3)
            if step == 2:
                x = torch.zeros(8, 3)
            loss = F.l1_loss(model(x), torch.ones(8, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)
