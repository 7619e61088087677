"""Failures of the forward pass reached through hooks, reparametrisations, custom functions and evaluation."""

import copy
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn


@fault("arithmetic inside a custom Function's forward", phase="forward", op=("aten::rsqrt",), module="norm", step=2)
def custom_function_overflows_in_its_forward() -> Loop:
    torch.manual_seed(0)

    class FastNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
            inverse = torch.rsqrt(x.square().sum(-1, keepdim=True))  # here
            ctx.save_for_backward(inverse)
            return x * inverse

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
            return gradient * ctx.saved_tensors[0]

    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return FastNorm.apply(x)

    model = nn.Sequential()
    model.add_module("lift", nn.Linear(4, 8, bias=False))
    model.add_module("norm", Norm())
    model.add_module("head", nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def run() -> None:
        for step in range(4):
            x = torch.randn(6, 4)
            x[1] *= step != 2
            loss = F.cross_entropy(model(x), torch.randint(0, 3, (6,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("a forward hook that normalises by a zero norm", phase="forward", op=("aten::div",), step=1)
def forward_hook_that_normalises_activations() -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def normalise(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output / output.norm(dim=-1, keepdim=True)  # here

    model[1].register_forward_hook(normalise)
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.fill_(0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for sign in (1, -1, 1):
            x = sign * (torch.rand(8, 4) + 0.5)
            loss = F.cross_entropy(model(x), torch.randint(0, 2, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("spectral norm of a layer initialised to zero", phase="forward", op=("aten::div",), step=0)
def spectral_norm_of_a_zero_initialised_layer() -> Loop:
    torch.manual_seed(0)

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8))
            self.head = nn.Linear(8, 1)
            nn.init.zeros_(self.head.weight)
            nn.utils.parametrizations.spectral_norm(self.head)

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.leaky_relu(self.body(x), 0.2)
            return self.head(hidden)  # here

    model = Critic()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(3):
            loss = F.relu(1 - model(torch.randn(8, 4))).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("weight norm of a zero direction", phase="forward", op=("aten::_weight_norm_interface",), step=0)
def weight_norm_of_a_zero_initialised_convolution() -> Loop:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self, *, is_last: bool) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 3, 3, padding=1)
            if is_last:
                nn.init.zeros_(self.conv.weight)
            nn.utils.parametrizations.weight_norm(self.conv)

        def forward(self, x: Tensor) -> Tensor:
            return x + F.elu(self.conv(x))  # here

    model = nn.Sequential(Block(is_last=False), Block(is_last=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(3):
            x = torch.randn(2, 3, 16)
            loss = F.mse_loss(model(x), x.roll(1, -1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("an ensemble under vmap, one member's scale is 0", phase="forward", op=("aten::log",), step=0)
def ensemble_evaluated_under_vmap() -> Loop:
    torch.manual_seed(0)

    class Member(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.mean = nn.Linear(3, 1)
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            error = (y - self.mean(x)).square().mean()
            return error + torch.log(self.scale)  # here

    members = nn.ModuleList(Member(scale) for scale in (1.0, 0.0, 0.5))
    parameters, buffers = torch.func.stack_module_state(list(members))
    skeleton = copy.deepcopy(members[0]).to("meta")
    optimizer = torch.optim.SGD(list(parameters.values()), lr=1e-3)

    def member_loss(weights: dict[str, Tensor], state: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return torch.func.functional_call(skeleton, (weights, state), (x, y))

    def run() -> None:
        for _ in range(3):
            x, y = torch.randn(8, 3), torch.randn(8, 1)
            losses = torch.vmap(member_loss, in_dims=(0, 0, None, None))(parameters, buffers, x, y)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()

    return Loop(members, run, optimizer)


@fault("a constant image between its minimum and maximum", phase="forward", op=("aten::div",), module="", step=2)
def constant_image_scaled_by_its_range_in_the_loop() -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def scans() -> Iterator[dict[str, Tensor]]:
        for number in range(4):
            image = torch.rand(2, 1, 8, 8)
            if number == 2:
                image[1] = 0.25
            yield {"image": image, "label": torch.tensor([0, 1])}

    def run() -> None:
        for scan in scans():
            image = scan["image"]
            low, high = image.amin((2, 3), keepdim=True), image.amax((2, 3), keepdim=True)
            image = (image - low) / (high - low)  # here
            loss = F.cross_entropy(model(image), scan["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("standardised in __getitem__ by a deviation of 0", phase="forward", op=("aten::div",), module="", step=2)
def dataset_that_divides_by_a_zero_deviation() -> Loop:
    torch.manual_seed(0)

    class Recordings(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.waves = torch.randn(16, 32)
            self.waves[9] = 1.5

        def __len__(self) -> int:
            return len(self.waves)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            wave = self.waves[index]
            return (wave - wave.mean()) / wave.std(), index % 2  # here

    model = nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for x, y in torch.utils.data.DataLoader(Recordings(), batch_size=4, num_workers=0):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("the deviation of one environment", phase="forward", op=("aten::std",), module="scale", step=1)
def policy_whose_distribution_refuses_its_logits() -> Loop:
    torch.manual_seed(0)

    class Scale(nn.Module):
        def forward(self, observation: Tensor) -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                deviation = observation.std(0)  # here
            return (observation - observation.mean(0)) / (deviation + 1e-6)

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.logits = Scale(), nn.Linear(4, 3)

        def forward(self, observation: Tensor) -> Tensor:
            return self.logits(self.scale(observation))

    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)

    def run() -> None:
        for environments in (8, 1, 8):
            distribution = torch.distributions.Categorical(logits=policy(torch.randn(environments, 4)))
            loss = -distribution.log_prob(distribution.sample()).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(policy, run, optimizer, raises=ValueError)


@fault("softmax of evaluation with a temperature of 0", phase="forward", op=("aten::div",), module="sampler")
def greedy_decoding_as_a_temperature_of_zero() -> Loop:
    torch.manual_seed(0)

    class Sampler(nn.Module):
        def forward(self, logits: Tensor, temperature: Tensor) -> Tensor:
            return (logits / temperature).softmax(-1)  # here

    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head, self.sampler = nn.Embedding(11, 8), nn.Linear(8, 11), Sampler()

        def forward(self, tokens: Tensor, temperature: Tensor) -> Tensor:
            return self.sampler(self.head(self.embed(tokens[:, -1])), temperature)

    model = Generator().eval()

    @torch.inference_mode()
    def run() -> None:
        tokens = torch.randint(0, 11, (2, 1))
        for temperature in torch.linspace(1, 0, 5):
            probabilities = model(tokens, temperature)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], dim=1)

    return Loop(model, run, raises=RuntimeError)


@fault("a checkpointed block divides by its empty gate", phase="forward", op=("aten::div",), module="blocks.1", step=2)
def block_under_activation_checkpointing() -> Loop:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.value = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            gate = self.gate(x).sigmoid() * keep
            return x + self.value(x) * gate / gate.sum(-1, keepdim=True)  # here

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(4, 2)

        def forward(self, x: Tensor, keeps: tuple[Tensor, Tensor]) -> Tensor:
            for block, keep in zip(self.blocks, keeps, strict=True):
                x = torch.utils.checkpoint.checkpoint(block, x, keep, use_reentrant=False)
            return self.head(x)

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for step in range(4):
            keeps = torch.ones(4), torch.ones(6, 4)
            keeps[1][3] *= step != 2
            loss = F.cross_entropy(model(torch.randn(6, 4), keeps), torch.randint(0, 2, (6,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)
