"""Failures of the forward pass on unusual paths to the harm: numbers, shared storage, buffers, sparse tensors."""

import warnings

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn


@fault("0/0 read by item() and multiplied as a number", phase="forward", op=("aten::div",), module="", step=2)
def weight_of_a_loss_that_went_through_item() -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))
    model(torch.randn(1, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(4):
            x, y = torch.randn(12, 5), torch.randint(0, 2, (12,))
            is_hard = torch.zeros(12) if step == 2 else torch.rand(12).round()
            share = is_hard[y == 1].sum() / is_hard.sum()  # here
            weight = 1.0 + share.item()
            loss = weight * F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("detach() shares storage: divided in place by 0", phase="forward", op=("aten::div_",), module="memory", step=2)
def activation_rescaled_through_its_detached_view() -> Loop:
    torch.manual_seed(0)

    class Memory(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                raw = x.detach()
                raw.div_(raw.abs().amax(-1, keepdim=True))  # here
            return x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.memory, self.head = nn.Linear(4, 6, bias=False), Memory(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.memory(self.embed(x)))

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for step in range(4):
            x = torch.randn(5, 4)
            x[0] *= step != 2
            loss = F.cross_entropy(model(x), torch.randint(0, 2, (5,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("the loss stays finite, only a buffer is spoilt", phase="forward", op=("aten::std",), module="norm", step=2)
def running_deviation_of_a_batch_of_one() -> Loop:
    torch.manual_seed(0)

    class RunningNorm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.register_buffer("deviation", torch.ones(width))
            self.register_buffer("seen", torch.tensor(0))
            self.register_buffer("history", torch.empty(0))
            self.register_buffer("is_frozen", torch.tensor(False))

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x / self.deviation
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                deviation = x.std(0)  # here
                self.deviation.lerp_(deviation, 0.1)
                self.seen += len(x)
            return x / x.abs().mean()

    model = nn.Sequential()
    model.add_module("norm", RunningNorm(3))
    model.add_module("head", nn.Linear(3, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for size in (8, 8, 1):
            loss = F.cross_entropy(model(torch.randn(size, 3)), torch.randint(0, 2, (size,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "negative degree to the power -1/2, signed graph", phase="forward", op=("aten::pow",), module="propagate", step=2
)
def sparse_propagation_over_a_signed_graph() -> Loop:
    torch.manual_seed(0)

    class Propagate(nn.Module):
        def forward(self, edges: Tensor, weights: Tensor, x: Tensor) -> Tensor:
            degree = torch.zeros(len(x)).scatter_add(0, edges[0], weights)
            inverse_root = degree.pow(-0.5)  # here
            values = inverse_root[edges[0]] * weights * inverse_root[edges[1]]
            adjacency = torch.sparse_coo_tensor(edges, values, (len(x), len(x)), check_invariants=False)
            return torch.sparse.mm(adjacency, x)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.propagate, self.second = nn.Linear(3, 8), Propagate(), nn.Linear(8, 2)

        def forward(self, edges: Tensor, weights: Tensor, x: Tensor) -> Tensor:
            return self.second(self.propagate(edges, weights, self.first(x).relu()))

    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    ring = torch.arange(5)
    edges = torch.cat([torch.stack([ring, (ring + 1) % 5]), torch.stack([(ring + 1) % 5, ring])], dim=1)

    def run() -> None:
        for step in range(4):
            weights = torch.rand(10) + 0.5
            if step == 2:
                weights[[1, 5]] = torch.tensor([-1.0, -0.5])
            loss = F.cross_entropy(model(edges, weights, torch.randn(5, 3)), torch.randint(0, 2, (5,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("1e13 cubed in a state that the next step reads", phase="forward", op=("aten::mul",), module="core", step=2)
def recurrent_state_carried_over_the_steps() -> Loop:
    torch.manual_seed(0)

    class Core(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(3, 3)

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            grown = state * 1e13  # here
            state = grown + 1
            return self.mix(x) + torch.tanh(state.detach()), state

    model = nn.ModuleDict({"core": Core(), "head": nn.Linear(3, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        state = torch.tensor([1.0, 2.0, -1.0])
        for _ in range(3):
            output, state = model["core"](torch.randn(4, 3), state)
            loss = model["head"](output).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        output, state = model["core"](torch.randn(4, 3), state)
        loss = model["head"](output).square().mean() + 1e-6 * state.square().mean()
        loss.backward()

    return Loop(model, run, optimizer)


@fault("exp in one column, spread by a strided copy", phase="forward", op=("aten::exp_",), module="", step=1)
def column_filled_through_a_strided_view() -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)

    def run() -> None:
        for temperature in (1.0, 1e-3, 1.0):
            logits = model(torch.rand(6, 4) + 1)
            rates = torch.zeros(6, 3)
            rates += logits / temperature
            column = rates.as_strided((6,), (3,), storage_offset=1)
            column.exp_()  # here
            target = torch.ones(6, 3)
            loss = (rates.T.contiguous() - target.T).abs().sum(0).amax()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with torch.no_grad():
        model[2].bias.add_(1.0)
    return Loop(model, run, optimizer)


@fault("padding of -inf joins a mean: NaN from inf - inf", phase="forward", op=("aten::sub",), module="pool", step=2)
def padding_of_minus_infinity_meets_a_subtraction() -> Loop:
    torch.manual_seed(0)

    class Pool(nn.Module):
        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            x = x.masked_fill(~keep[..., None], -torch.inf)
            low, high = x.kthvalue(3, dim=1).values, x.amax(1)
            return high - low  # here

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.pool, self.head = nn.Linear(3, 6), Pool(), nn.Linear(6, 2)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            return self.head(self.pool(self.net(x), keep))

    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for shortest in (3, 4, 0, 5):
            keep = torch.arange(5) < torch.tensor([[5], [shortest]])
            loss = F.cross_entropy(model(torch.randn(2, 5, 3), keep), torch.tensor([0, 1]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)
