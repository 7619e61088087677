"""Updates, averages and gradient edits that users write themselves, between the backward pass and the next step."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn

DIV = ("aten::div", "aten::div_")
RECIPROCAL = ("aten::reciprocal", "aten::div")


def small_net(inputs: int = 4, outputs: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


@fault("own optimizer without eps: an input that is always 0", phase="optimizer", op=DIV, module="", step=0)
def own_rmsprop_without_eps() -> Loop:
    class PlainRMSprop(torch.optim.Optimizer):
        def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-3, decay: float = 0.9) -> None:
            super().__init__(parameters, {"lr": lr, "decay": decay})

        @torch.no_grad()
        def step(self, closure: Callable[[], Tensor] | None = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    square = self.state[p].setdefault("square", torch.zeros_like(p))
                    square.mul_(group["decay"]).addcmul_(p.grad, p.grad, value=1 - group["decay"])
                    p.sub_(group["lr"] * (p.grad / square.sqrt()))  # here

    torch.manual_seed(0)
    model = small_net()
    optimizer = PlainRMSprop(model.parameters())

    def run() -> None:
        for _ in range(3):
            x = torch.randn(6, 4)
            x[:, 3] = 0.0
            loss = F.cross_entropy(model(x), torch.randint(0, 2, (6,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("trust ratio of LAMB (You 2020) for a bias that starts at 0", phase="optimizer", op=DIV, module="", step=0)
def own_lamb_with_a_zero_update() -> Loop:
    class Lamb(torch.optim.Optimizer):
        def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-2) -> None:
            super().__init__(parameters, {"lr": lr})

        def trust(self, p: Tensor, update: Tensor) -> Tensor:
            return p.norm() / update.norm()  # here

        def step(self, closure: Callable[[], Tensor] | None = None) -> None:
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        m = self.state[p].setdefault("m", torch.zeros_like(p))
                        m.lerp_(p.grad, 0.1)
                        p.add_(m * self.trust(p, m), alpha=-group["lr"])

    torch.manual_seed(1)
    model = nn.ModuleDict({"on": nn.Linear(3, 2), "off": nn.Linear(3, 2)})
    nn.init.zeros_(model["off"].bias)
    optimizer = Lamb(model.parameters())

    def run() -> None:
        for _ in range(3):
            x = torch.randn(5, 3)
            loss = (model["on"](x) + 0 * model["off"](x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("Newton-Schulz of a zero gradient divided by its norm", phase="optimizer", op=DIV, module="", step=2)
def own_muon_on_a_layer_without_gradient() -> Loop:
    class Muon(torch.optim.Optimizer):
        def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
            super().__init__(parameters, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Callable[[], Tensor] | None = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(orthogonalised(p.grad), alpha=-group["lr"])

    def orthogonalised(gradient: Tensor, rounds: int = 3) -> Tensor:
        x = gradient / gradient.norm()  # here
        for _ in range(rounds):
            x = 1.5 * x - 0.5 * x @ x.T @ x
        return x

    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.abs_()
    optimizer = Muon(model.parameters(), lr=1e-3)

    def run() -> None:
        for sign in (1, 1, -1, 1):
            loss = F.mse_loss(model(sign * torch.rand(6, 4)), torch.ones(6, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("Adam by hand in bfloat16: 0.999 is 1, 1 - 1 is 0", phase="optimizer", op=DIV, module="")
def own_adam_whose_decay_rounds_to_one() -> Loop:
    torch.manual_seed(3)
    model = small_net().bfloat16()
    betas = torch.tensor([0.9, 0.999], dtype=torch.bfloat16)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}

    def update(count: int, lr: float = 1e-3) -> None:
        for name, p in model.named_parameters():
            m, v = moments[name]
            m.mul_(betas[0]).add_((1 - betas[0]) * p.grad)
            v.mul_(betas[1]).add_(1e-3 * p.grad**2)
            corrected = v / (1 - betas[1] ** count)  # here
            p.sub_(lr * m / (1 - betas[0] ** count) / (corrected.sqrt() + 1e-8))

    def run() -> None:
        for count in range(1, 4):
            x = torch.randn(8, 4, dtype=torch.bfloat16)
            x[:, 0] = 0.0
            model.zero_grad()
            F.cross_entropy(model(x).float(), torch.randint(0, 2, (8,))).backward()
            with torch.no_grad():
                update(count)

    return Loop(model, run)


@fault("normalised gradient descent by hand, no optimizer", phase="optimizer", op=DIV, module="")
def update_by_hand_with_a_vanished_gradient() -> Loop:
    torch.manual_seed(4)
    model = small_net(3, 1)

    def run() -> None:
        for step in range(5):
            x = torch.randn(6, 3)
            weight = torch.zeros(6, 1) if step == 3 else torch.ones(6, 1)
            loss = (weight * (model(x) - x.sum(1, keepdim=True)) ** 2).mean()
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.01 * p.grad / p.grad.norm()  # here
                    p.grad.zero_()

    return Loop(model, run)


@fault("max_norm / 0, then 0 * inf", phase="optimizer", op=RECIPROCAL, module="", step=2)
def clipping_by_hand_of_a_zero_gradient() -> Loop:
    torch.manual_seed(5)
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def rescale(max_norm: float) -> None:
        gradients = [p.grad for p in model.parameters()]
        total = torch.stack([gradient.norm() for gradient in gradients]).norm()
        factor = max_norm / total  # here
        for gradient in gradients:
            gradient.mul_(factor)

    def run() -> None:
        for step in range(4):
            label = torch.full((6,), -100) if step == 2 else torch.randint(0, 2, (6,))
            loss = F.cross_entropy(model(torch.randn(6, 4)), label, reduction="sum")
            optimizer.zero_grad()
            loss.backward()
            rescale(1.0)
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("sharpness-aware step (Foret 2021): rho / 0, then 0 * inf", phase="optimizer", op=RECIPROCAL, module="", step=3)
def sharpness_aware_ascent_without_a_gradient() -> Loop:
    torch.manual_seed(6)
    model = small_net(5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def hinge(x: Tensor, y: Tensor) -> Tensor:
        return F.relu(1 - y * model(x)).mean()

    @torch.no_grad()
    def climb(rho: float = 0.05) -> list[Tensor]:
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        scale = rho / norm  # here
        moves = [scale * p.grad for p in model.parameters()]
        for p, move in zip(model.parameters(), moves, strict=True):
            p.add_(move)
        return moves

    def run() -> None:
        for step in range(5):
            x = torch.randn(6, 5)
            y = model(x).detach() * (1e6 if step == 3 else 1)
            optimizer.zero_grad()
            hinge(x, y).backward()
            moves = climb()
            optimizer.zero_grad()
            hinge(x, y).backward()
            with torch.no_grad():
                for p, move in zip(model.parameters(), moves, strict=True):
                    p.sub_(move)
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("gradient standardisation by hand: a bias of one element", phase="optimizer", op=DIV, module="", step=0)
def standardised_gradient_of_a_single_bias() -> Loop:
    torch.manual_seed(7)
    model = small_net(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(3):
            loss = F.softplus(model(torch.randn(4, 3))).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for p in model.parameters():
                p.grad = (p.grad - p.grad.mean()) / p.grad.std(correction=0)  # here
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("unit-norm constraint on a pruned feature", phase="optimizer", op=DIV, module="")
def dictionary_atom_of_no_length_after_pruning() -> Loop:
    class Dictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(5, 7)
            self.atoms = nn.Parameter(F.normalize(torch.randn(7, 5), dim=1))
            self.register_buffer("alive", torch.ones(7, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.encode(x)) @ (self.atoms * self.alive)

    torch.manual_seed(8)
    model = Dictionary()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    @torch.no_grad()
    def constrain() -> None:
        model.atoms.mul_(model.alive)
        model.atoms.div_(model.atoms.square().sum(1, keepdim=True).sqrt())  # here

    def run() -> None:
        for step in range(5):
            if step == 3:
                model.alive[2] = 0.0
            x = torch.randn(9, 5)
            loss = F.mse_loss(model(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            constrain()

    return Loop(model, run, optimizer)


@fault("bias correction 1 - decay ** 0 of an EMA that is put back", phase="optimizer", op=DIV, module="")
def average_of_weights_corrected_at_step_zero() -> Loop:
    class WeightAverage:
        def __init__(self, model: nn.Module, decay: float) -> None:
            self.model, self.decay, self.num_updates = model, decay, 0
            self.shadow = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

        @torch.no_grad()
        def update(self) -> None:
            for name, p in self.model.named_parameters():
                self.shadow[name].lerp_(p, 1 - self.decay)
            self.num_updates += 1

        @torch.no_grad()
        def copy_back(self) -> None:
            correction = 1 - self.decay**self.num_updates
            for name, p in self.model.named_parameters():
                p.copy_(self.shadow[name] / correction)  # here

    torch.manual_seed(9)
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    average = WeightAverage(model, decay=0.99)
    update_every = 10

    def run() -> None:
        for step in range(1, 5):
            loss = F.cross_entropy(model(torch.randn(6, 4)), torch.randint(0, 2, (6,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % update_every == 0:
                average.update()
        average.copy_back()
        model.eval()
        with torch.no_grad():
            model(torch.randn(2, 4))

    return Loop(model, run, optimizer)
