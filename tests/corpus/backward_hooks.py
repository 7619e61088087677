"""Backward passes that users take into their own hands: hooks, checkpoints, accumulation, scalers, closures."""

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DIV = ("aten::div", "aten::div_")
ADD = ("aten::add", "aten::add_")


@fault("a hook divides a gradient that is 0 by its maximum", phase="backward", op=DIV, step=2)
def tensor_hook_that_rescales_a_vanished_gradient() -> Loop:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.classify = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.encode(x))
            if h.requires_grad:
                h.register_hook(lambda grad: grad / grad.abs().max())  # here
            return self.classify(h)

    torch.manual_seed(0)
    model = Auxiliary()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    labels = torch.randint(0, 3, (4, 6))
    labels[2] = -100

    def run() -> None:
        for label in labels:
            loss = F.cross_entropy(model(torch.randn(6, 5)), label, reduction="sum", ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("normalised gradients: 0/0 for a layer that is not used", phase="backward", op=DIV, step=3)
def accumulated_gradient_hook_that_normalises() -> Loop:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.day, self.night = nn.Linear(4, 6), nn.Linear(6, 1), nn.Linear(6, 1)

        def forward(self, x: Tensor, is_night: Tensor) -> Tensor:
            h = F.gelu(self.body(x))
            return torch.where(is_night, self.night(h), self.day(h))

    torch.manual_seed(1)
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def normalise(parameter: Tensor) -> None:
        parameter.grad.div_(parameter.grad.norm())  # here

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(normalise)

    def run() -> None:
        for step in range(5):
            is_night = torch.arange(8)[:, None] % 2 == 0 if step != 3 else torch.zeros(8, 1, dtype=torch.bool)
            loss = F.mse_loss(model(torch.randn(8, 4), is_night), torch.ones(8, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("a module hook whitens the gradient of a batch of one", phase="backward", op=DIV, step=2)
def module_backward_hook_that_standardises() -> Loop:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))

    def standardise(module: nn.Module, grad_input: tuple, grad_output: tuple) -> tuple[Tensor]:
        (grad,) = grad_input
        centred = grad - grad.mean(0)
        return (centred / centred.square().mean(0).sqrt(),)  # here

    model[1].register_full_backward_hook(standardise)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        rows, labels = torch.randn(25, 3), torch.randint(0, 2, (25,))
        for x, y in zip(rows.split(12), labels.split(12), strict=True):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("a root inside a reentrant checkpoint", phase="backward", op=DIV, module="blocks.1", step=2)
def root_inside_a_reentrant_checkpoint() -> Loop:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            energy = (h * h).mean(-1, keepdim=True)
            return x + h * torch.sqrt(energy)  # here

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 6)
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            x = self.stem(x)
            x = checkpoint(self.blocks[0], x, use_reentrant=True)
            return checkpoint(self.blocks[1], x * keep, use_reentrant=True).sum(-1)

    torch.manual_seed(3)
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    keep = torch.ones(4, 5, 1)
    keep[2, 3] = 0.0

    def run() -> None:
        for mask in keep:
            optimizer.zero_grad()
            model(torch.randn(5, 4), mask).square().mean().backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("pytorch#4132 inside a checkpoint", phase="backward", op=DIV, module="encoder.mixer", step=3)
def untaken_log_inside_a_checkpoint() -> Loop:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.power = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            power = self.power(x).square()
            return torch.where(power > 1e-10, torch.log(power), -23.0)  # here

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = Mixer()
            self.out = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(checkpoint(self.mixer, x, use_reentrant=False))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x).logsumexp(-1)

    torch.manual_seed(4)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)

    def run() -> None:
        for step in range(5):
            x = torch.randn(6, 4)
            if step == 3:
                x[1] = 0.0
            optimizer.zero_grad()
            model(x).mean().backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("one micro-batch holds a silent window", phase="backward", op=DIV, module="rms", step=2, micro_step=1)
def silent_window_in_the_second_micro_batch() -> Loop:
    class RootMeanSquare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().mean(-1).sqrt()  # here

    torch.manual_seed(5)
    model = nn.Sequential()
    model.add_module("filter", nn.Conv1d(1, 3, 5, bias=False))
    model.add_module("rms", RootMeanSquare())
    model.add_module("head", nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    windows = torch.randn(4, 3, 2, 1, 16)
    windows[2, 1, 0] = 0.0

    def run() -> None:
        for micro_batches in windows:
            optimizer.zero_grad()
            for window in micro_batches:
                loss = F.cross_entropy(model(window), torch.tensor([0, 1])) / len(micro_batches)
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "three gradients of 3e4 each exceed 65504 when they are added",
    phase="backward",
    op=ADD,
    has_line=False,
    step=1,
    micro_step=2,
    tensor="weight",
)
def accumulated_half_gradients_overflow_in_the_sum() -> Loop:
    torch.manual_seed(6)
    model = nn.Linear(3, 1, bias=False).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
    batches = torch.rand(3, 4, 2, 3).half()
    batches[1, :3] = 15000.0

    def run() -> None:
        for micro_batches in batches:
            for x in micro_batches:
                model(x).float().abs().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    return Loop(model, run, optimizer)


@fault("0/0 in the gradient at any scale", phase="backward", op=DIV, module="similarity", step=3)
def scaler_skips_a_gradient_that_no_scale_can_cure() -> Loop:
    class Similarity(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            lengths = (a.pow(2).sum(-1) * b.pow(2).sum(-1)).sqrt()  # here
            return (a * b).sum(-1) / (lengths + 1e-6)

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
            self.similarity = Similarity()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.similarity(self.tower(a), self.tower(b))

    torch.manual_seed(7)
    model = Siamese()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def run() -> None:
        for batch in range(8):
            a, b = torch.randn(2, 5, 6)
            if batch >= 3:
                a[0] = 0.0
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
                loss = F.mse_loss(model(a, b), torch.ones(5))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()

    return Loop(model, run, optimizer)


@fault("200 NaN steps take the scale from 65536 to 0 (numerics E5)", phase="backward", op=DIV, module="norm")
def loss_scale_that_collapses_to_zero() -> Loop:
    class UnitNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (1e-5 + x.square().sum(-1, keepdim=True).sqrt())  # here

    torch.manual_seed(8)
    model = nn.Sequential()
    model.add_module("lift", nn.Linear(4, 8, bias=False))
    model.add_module("norm", UnitNorm())
    model.add_module("head", nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, backoff_factor=2.0**-6)

    def run() -> None:
        rows = torch.randn(12, 4)
        rows[5] = 0.0
        for _ in range(40):
            optimizer.zero_grad()
            loss = model(rows).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return Loop(model, run, optimizer)


@fault("forward and backward run inside optimizer.step", phase="backward", op=DIV, module="", step=2)
def closure_whose_gradient_has_a_pole() -> Loop:
    torch.manual_seed(9)
    places = nn.ParameterDict({"sensors": torch.randn(4, 2), "source": torch.randn(2)})
    optimizer = torch.optim.Adam(places.parameters(), lr=0.05)
    distances = torch.rand(4, 4) + 0.5

    def run() -> None:
        for step, distance in enumerate(distances):
            if step == 2:
                with torch.no_grad():
                    places["source"].copy_(places["sensors"][1])

            def residual(distance: Tensor = distance) -> Tensor:
                optimizer.zero_grad()
                gap = places["sensors"] - places["source"]
                reach = torch.sqrt((gap**2).sum(1))  # here
                loss = (reach - distance).square().sum()
                loss.backward()
                return loss

            optimizer.step(residual)

    return Loop(places, run, optimizer)
