"""Gradients of gradients, gradients inside the forward pass, several backward passes, models that are functions."""

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn

DIV = ("aten::div", "aten::div_")
POW = ("aten::pow", "aten::pow_")


@fault("WGAN-GP (Gulrajani 2017): root of a critic's zero gradient", phase="backward", op=DIV, module="", step=2)
def gradient_penalty_where_the_critic_is_dead() -> Loop:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        critic[0].weight.abs_()
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.9))

    def penalty(real: Tensor, fake: Tensor) -> Tensor:
        share = torch.rand(len(real), 1)
        mixed = (share * real + (1 - share) * fake).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        length = torch.sqrt(torch.sum(gradient**2, dim=1))  # here
        return ((length - 1) ** 2).mean()

    def run() -> None:
        for step in range(4):
            real, fake = torch.rand(6, 3), torch.rand(6, 3)
            if step == 2:
                real[1], fake[1] = -real[1], -fake[1]
            loss = critic(fake).mean() - critic(real).mean() + 10 * penalty(real, fake)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(critic, run, optimizer)


@fault("forces: two atoms at one place, in the first derivative", phase="backward", op=DIV, module="potential", step=2)
def forces_of_two_atoms_at_the_same_place() -> Loop:
    class Potential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Sequential(nn.Linear(1, 8), nn.Softplus(), nn.Linear(8, 1))

        def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
            position = position.requires_grad_()
            i, j = torch.triu_indices(len(position), len(position), offset=1)
            distance = (position[i] - position[j]).square().sum(-1).sqrt()  # here
            energy = self.pair(distance[:, None]).sum()
            (gradient,) = torch.autograd.grad(energy, position, create_graph=True)
            return energy, -gradient

    torch.manual_seed(1)
    model = nn.ModuleDict({"potential": Potential()})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    frames = torch.randn(4, 5, 3)
    frames[2, 4] = frames[2, 0]

    def run() -> None:
        for frame in frames:
            energy, force = model["potential"](frame.clone())
            loss = energy.square() + force.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("x ** 1.5 has a first derivative at 0, not a second", phase="backward", op=POW, module="", step=3)
def second_derivative_of_a_power_in_a_physics_loss() -> Loop:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(2, 6, bias=False), nn.Tanh(), nn.Linear(6, 1, bias=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    points = torch.rand(5, 10, 2) + 0.1
    points[3, 2] = 0.0

    def slope(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(model(at).abs().pow(1.5).sum(), at, create_graph=True)[0]  # here

    def run() -> None:
        for at in points:
            loss = (slope(at) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("MAML (Finn 2017): the inner gradient is taken inside forward", phase="backward", op=DIV, module="adapt", step=2)
def inner_loop_of_meta_learning_has_a_pole() -> Loop:
    class Adapt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 4) / 2)
            self.rate = nn.Parameter(torch.tensor(0.1))

        def forward(self, support: tuple[Tensor, Tensor], query: Tensor) -> Tensor:
            weight = self.weight
            x, y = support
            with torch.enable_grad():
                for _ in range(2):
                    error = (F.linear(x, weight) - y).square().mean(0)
                    inner = torch.sqrt(error).sum()  # here
                    (gradient,) = torch.autograd.grad(inner, weight, create_graph=True)
                    weight = weight - self.rate * gradient
            return F.linear(query, weight)

    torch.manual_seed(3)
    model = nn.Module()
    model.adapt = Adapt()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def run() -> None:
        for task in range(4):
            x, y, query = torch.randn(5, 4), torch.randn(5, 1), torch.randn(7, 4)
            if task == 2:
                x, y = torch.zeros(5, 4), torch.zeros(5, 1)
            loss = model.adapt((x, y), query).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("three losses with a backward pass each: the second one", phase="backward", op=DIV, module="", step=2)
def several_losses_that_go_backward_one_by_one() -> Loop:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(6, 3, bias=False), nn.Linear(3, 6)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            code = self.encode(x)
            return {"code": code, "image": self.decode(code)}

    torch.manual_seed(4)
    model = Autoencoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def losses(x: Tensor) -> list[Tensor]:
        out = model(x)
        rebuilt = F.mse_loss(out["image"], x)
        group_sparsity = out["code"].square().sum(1).sqrt().mean()  # here
        smooth = out["image"].diff(dim=1).abs().mean()
        return [rebuilt, 0.1 * group_sparsity, 0.1 * smooth]

    def run() -> None:
        for step in range(4):
            x = torch.rand(5, 6)
            if step == 2:
                x[3] = 0.0
            optimizer.zero_grad()
            for loss in losses(x):
                loss.backward(retain_graph=True)
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("a root in a functional model under torch.func", phase="backward", op=DIV, module="", step=2)
def functional_call_with_a_root() -> Loop:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_of(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, weights["0.weight"]))
        length = h.square().sum(-1, keepdim=True).sqrt()  # here
        return F.cross_entropy(F.linear(h / (length + 1e-6), weights["2.weight"], weights["2.bias"]), y)

    def run() -> None:
        for step in range(4):
            x, y = torch.randn(6, 4), torch.randint(0, 2, (6,))
            if step == 2:
                x[0] = 0.0
            weights = {name: weight.detach() for name, weight in model.named_parameters()}
            gradients = torch.func.grad(loss_of)(weights, x, y)
            for name, weight in model.named_parameters():
                weight.grad = gradients[name]
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("weights in a dict, no nn.Module, an update by hand", phase="backward", op=DIV, module="")
def network_of_plain_tensors_without_a_module() -> Loop:
    torch.manual_seed(6)
    weights = {"in": torch.randn(3, 5, requires_grad=True), "out": torch.randn(5, 1, requires_grad=True)}

    def predict(x: Tensor) -> Tensor:
        h = x @ weights["in"]
        length = torch.pow(h, 2).sum(1, keepdim=True).sqrt()  # here
        return (h / (1 + length)) @ weights["out"]

    def run() -> None:
        for step in range(4):
            x = torch.randn(8, 3)
            x[2] *= step != 2
            loss = (predict(x) - 1).abs().mean()
            loss.backward()
            with torch.no_grad():
                for weight in weights.values():
                    weight -= 0.01 * weight.grad
                    weight.grad = None

    return Loop(None, run)


@fault("clipping spreads an Inf that (1 / x) ** 2 made", phase="backward", op=("aten::mul",), module="ratio", step=2)
def clipping_a_gradient_that_is_infinite_already() -> Loop:
    class Ratio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depth = nn.Parameter(torch.tensor([1.0, 1e-3, 2.0]))

        def forward(self, shift: Tensor) -> Tensor:
            disparity = 1e-20 / (self.depth * shift)  # here
            return disparity.atan()

    class Stereo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ratio = Ratio()
            self.head = nn.Linear(3, 1)

        def forward(self, shift: Tensor) -> Tensor:
            return self.head(self.ratio(shift))

    torch.manual_seed(7)
    model = Stereo()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(4):
            shift = torch.ones(2, 3)
            if step == 2:
                shift[1, 1] = 1e-22
            loss = model(shift).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.step()

    return Loop(model, run, optimizer)
