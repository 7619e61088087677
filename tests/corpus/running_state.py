"""State that a forward pass writes: running statistics, counters, queues, arguments that an operation changes."""

import numpy as np
import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn

BATCH_NORM = (
    "aten::native_batch_norm",
    "aten::_native_batch_norm_legit",
    "aten::_batch_norm_with_update",
    "aten::batch_norm",
)


@torch.library.custom_op("corpus::centre_", mutates_args={"scale"})
def centre_(scale: Tensor, x: Tensor, by: float) -> Tensor:
    """Divides the scale in place, and gives the mean of x."""
    scale.div_(by)
    return x.mean(0)


@torch.library.custom_op("corpus::count_and_divide", mutates_args={"calls"})
def count_and_divide(calls: Tensor, x: Tensor, by: float) -> Tensor:
    """Counts the call in place, and divides."""
    calls.add_(1)
    return x / by


@fault(
    "(1e25) ** 2 in the running variance; the output is finite", phase="forward", op=BATCH_NORM, module="norm", step=2
)
def running_variance_overflows_behind_a_finite_output() -> Loop:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x))  # here

    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for gain in (1, 1, 1e25, 1):
            loss = F.mse_loss(model(torch.randn(8, 4) * gain), torch.ones(8, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "variance of one sample: n / (n - 1) in the running variance", phase="forward", op=BATCH_NORM, module="1", step=1
)
def running_variance_of_a_batch_of_one() -> Loop:
    class UncheckedNorm(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            stats = (self.running_mean, self.running_var)
            return torch.batch_norm(x, self.weight, self.bias, *stats, True, 0.1, 1e-5, False)  # here

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), UncheckedNorm(4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def run() -> None:
        for rows in (5, 1, 5):
            loss = F.cross_entropy(model(torch.randn(rows, 3)), torch.randint(2, (rows,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "an operation that divides its argument in place", phase="forward", op=("corpus::centre_",), module="gain", step=2
)
def custom_operation_spoils_the_buffer_it_changes() -> Loop:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(3))

        def forward(self, x: Tensor, level: float) -> Tensor:
            return x - centre_(self.scale, x.detach(), level)  # here

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.gain = nn.Linear(4, 3), Gain()

        def forward(self, x: Tensor, level: float) -> Tensor:
            return self.gain(self.body(x), level)

    torch.manual_seed(2)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for level in (1.0, 2.0, 0.0, 1.0):
            loss = model(torch.randn(5, 4), level).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "an operation that counts in place and divides by 0",
    phase="forward",
    op=("corpus::count_and_divide",),
    module="divide",
    step=1,
)
def custom_operation_counts_well_and_returns_inf() -> Loop:
    class Divide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, by: float) -> Tensor:
            return x + count_and_divide(self.calls, x.detach(), by)  # here

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.divide = nn.Linear(4, 3), Divide()

        def forward(self, x: Tensor, by: float) -> Tensor:
            return self.divide(self.body(x), by)

    torch.manual_seed(3)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for by in (2.0, 0.0, 2.0):
            loss = model(torch.randn(5, 4), by).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "MoCo's queue (He 2020): a key of length 0 is stored", phase="forward", op=("aten::div",), module="queue", step=1
)
def queue_of_keys_takes_in_a_zero_vector() -> Loop:
    class Queue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", F.normalize(torch.randn(8, 4), dim=1))
            self.next = 0

        def forward(self, embedded: Tensor) -> Tensor:
            similarity = embedded @ self.keys.clone().mT
            fresh = embedded.detach()
            rows = torch.arange(self.next, self.next + len(fresh)) % len(self.keys)
            self.keys[rows] = fresh / fresh.norm(dim=1, keepdim=True)  # here
            self.next += len(fresh)
            return similarity

    class Contrast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.queue = nn.Linear(5, 4, bias=False), Queue()

        def forward(self, x: Tensor) -> Tensor:
            return self.queue(self.embed(x))

    torch.manual_seed(4)
    model = Contrast()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for step in range(4):
            x = torch.randn(2, 5)
            if step == 1:
                x[0] = 0.0
            loss = model(x).logsumexp(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("the best weights, saved after the damage", phase="weights", module="core", has_line=False, tensor="core.bias")
def best_weights_put_back_inside_the_loop() -> Loop:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.core(x).relu())

    torch.manual_seed(5)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    best = {name: value.clone() for name, value in model.state_dict().items()}
    best["core.bias"][0] = torch.nan

    def run() -> None:
        for step in range(4):
            loss = model(torch.randn(6, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == 1:
                model.load_state_dict(best)

    return Loop(model, run, optimizer)


@fault("skip_init, and no checkpoint after it", phase="weights", module="adapter", tensor="adapter.weight", step=0)
def layer_made_without_initial_values() -> Loop:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.adapter = nn.utils.skip_init(nn.Linear, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.adapter(self.stem(x).relu())  # here

    torch.manual_seed(6)
    torch.use_deterministic_algorithms(True)
    try:
        model = Model()
    finally:
        torch.use_deterministic_algorithms(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(3):
            loss = F.cross_entropy(model(torch.randn(6, 4)), torch.randint(2, (6,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "a buffer written through numpy, unseen by torch", phase="weights", module="centre", tensor="centre.mean", step=1
)
def buffer_spoilt_through_its_numpy_view() -> Loop:
    class Centre(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return x - self.mean  # here

    torch.manual_seed(7)
    model = nn.Sequential()
    model.add_module("centre", Centre())
    model.add_module("head", nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for step in range(3):
            if step == 1:
                model.centre.mean.numpy()[2] = np.nan
            loss = model(torch.randn(6, 4)).logsumexp(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("class weight 1/0 kept by the criterion", phase="weights", module="criterion", tensor="criterion.weight", step=0)
def criterion_that_keeps_an_infinite_class_weight() -> Loop:
    class Classifier(nn.Module):
        def __init__(self, counts: Tensor) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)
            self.criterion = nn.CrossEntropyLoss(weight=1 / counts)

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return self.criterion(self.net(x), label)  # here

    torch.manual_seed(8)
    model = Classifier(torch.tensor([5.0, 2.0, 0.0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for _ in range(3):
            loss = model(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)
