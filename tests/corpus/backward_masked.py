"""Branches that the forward pass leaves out and the backward pass does not (pytorch#4132)."""

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn

DIV = ("aten::div", "aten::div_")


@fault("pytorch#4132: 0 * (1/0) in the untaken branch", phase="backward", op=DIV, module="entropy", step=2)
def entropy_of_sparse_attention_with_where() -> Loop:
    class Entropy(nn.Module):
        def forward(self, weights: Tensor) -> Tensor:
            logs = torch.where(weights > 0, weights.log(), torch.zeros(()))  # here
            return -(weights * logs).sum(-1).mean()

    class SparseAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)
            self.entropy = Entropy()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores = F.softplus(self.query(x) @ self.key(x).mT / 6**0.5)
            weights = F.relu(scores - 1e-9)
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
            return weights @ x, self.entropy(weights)

    torch.manual_seed(0)
    model = SparseAttention()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for scale in (1.0, 1.0, 12.0, 1.0):
            out, entropy = model(scale * torch.randn(2, 5, 6))
            loss = out.square().mean() + 0.01 * entropy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("exp overflows in the untaken branch, then 0 * inf", phase="forward", op=("aten::exp",), module="1", step=3)
def hand_made_elu_on_a_large_activation() -> Loop:
    class ELU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, torch.exp(x) - 1)  # here

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), ELU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def run() -> None:
        for step in range(5):
            x = torch.randn(16, 5)
            if step == 3:
                x[2] *= 500
            loss = F.l1_loss(model(x), torch.zeros(16, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("pytorch#23156 and its kin: indexing selects after the log", phase="backward", op=DIV, module="", step=2)
def log_rates_indexed_by_a_mask() -> Loop:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def poisson(rate: Tensor, count: Tensor) -> Tensor:
        observed = (rate > 0) & (count >= 0)
        log_rate = torch.log(rate)  # here
        return (rate[observed] - count[observed] * log_rate[observed]).mean()

    def run() -> None:
        for scale in (1.0, 1.0, 3000.0, 1.0):
            rate = F.softplus(model(scale * torch.randn(10, 4)))
            loss = poisson(rate, torch.poisson(torch.ones(10, 8)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("nan_to_num(z / z): finite value, 0/0 in the gradient", phase="backward", op=DIV, module="gate", step=3)
def quotient_repaired_with_nan_to_num() -> Loop:
    class Gate(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            share = z / z.sum(-1, keepdim=True)  # here
            return torch.nan_to_num(share)

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Linear(4, 3, bias=False)
            self.gate = Gate()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            share = self.gate(self.logits(x).square())
            return torch.stack([expert(x) for expert in self.experts], -1).mul(share[:, None]).sum(-1)

    torch.manual_seed(3)
    model = Router()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tokens = torch.rand(5, 6, 4)
    tokens[3, 1] = 0.0

    def run() -> None:
        for x in tokens:
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("log of a softmax that is 0 in a class without label", phase="backward", op=DIV, module="", step=2)
def hand_written_log_softmax_with_gather() -> Loop:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scales = (1.0, 1.0, 400.0, 1.0)

    def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
        shifted = (logits - logits.amax(1, keepdim=True)).exp()
        probability = shifted / shifted.sum(1, keepdim=True)
        log_probability = torch.log(probability)  # here
        return -log_probability.gather(1, label[:, None]).mean()

    def run() -> None:
        for scale in scales:
            logits = scale * model(torch.randn(8, 3))
            loss = cross_entropy(logits, logits.detach().argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("atan(y / 0) is a quarter turn, its gradient 0/0", phase="backward", op=DIV, module="polar", step=1)
def angle_as_arctangent_of_a_quotient() -> Loop:
    class Polar(nn.Module):
        def forward(self, xy: Tensor) -> Tensor:
            x, y = xy.unbind(-1)
            return torch.atan(y / x)  # here

    class Rotor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Linear(2, 2, bias=False)
            self.polar = Polar()

        def forward(self, points: Tensor) -> Tensor:
            return self.polar(self.turn(points))

    torch.manual_seed(5)
    model = Rotor()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.no_grad():
        model.turn.weight.copy_(torch.eye(2))
    points = torch.rand(3, 6, 2) + 0.1
    points[1, 4, 0] = 0.0

    def run() -> None:
        for batch in points:
            loss = (model(batch) - 0.3).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("logsumexp where no path leads: -inf - (-inf)", phase="backward", op=("aten::sub",), module="crf", step=1)
def forward_algorithm_with_forbidden_transitions() -> Loop:
    class ChainCRF(nn.Module):
        def __init__(self, allowed: Tensor) -> None:
            super().__init__()
            self.register_buffer("allowed", allowed)
            self.transition = nn.Parameter(torch.zeros(allowed.shape))

        def forward(self, emission: Tensor, start: Tensor) -> Tensor:
            transition = self.transition.masked_fill(~self.allowed, -torch.inf)
            alpha = torch.full_like(emission[0], -torch.inf).index_fill(0, start, 0.0) + emission[0]
            for frame in emission[1:]:
                alpha = torch.logsumexp(alpha[:, None] + transition, dim=0) + frame  # here
            return torch.logsumexp(alpha, 0)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emit = nn.Linear(5, 4)
            self.crf = ChainCRF(torch.eye(4, dtype=torch.bool) | torch.eye(4, dtype=torch.bool).roll(1, 1))

        def forward(self, words: Tensor, start: Tensor) -> Tensor:
            emission = self.emit(words)
            return self.crf(emission, start) - emission.diagonal().sum()

    torch.manual_seed(6)
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    starts = [torch.arange(4), torch.tensor([1]), torch.arange(4)]

    def run() -> None:
        for start in starts:
            optimizer.zero_grad()
            model(torch.randn(4, 5), start).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "a black line restored as black: eps * eps is 0 in float16", phase="backward", op=DIV, module="criterion", step=2
)
def charbonnier_loss_whose_eps_is_lost_in_half() -> Loop:
    class Charbonnier(nn.Module):
        def forward(self, image: Tensor, target: Tensor) -> Tensor:
            difference = image - target
            return torch.sqrt(difference * difference + 1e-12).mean()  # here

    class Restore(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8, bias=False)
            self.criterion = Charbonnier()

        def forward(self, image: Tensor, target: Tensor) -> Tensor:
            return self.criterion(image + self.layer(image), target)

    torch.manual_seed(7)
    model = Restore().half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(4):
            image = torch.randn(4, 8).half()
            target = image + 0.5
            if step == 2:
                image[1], target[1] = 0.0, 0.0
            optimizer.zero_grad()
            model(image, target).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("own autograd.Function: its backward divides by an empty count", phase="backward", op=DIV, module="top", step=3)
def custom_function_whose_backward_divides_by_zero() -> Loop:
    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, threshold: float) -> Tensor:
            kept = (x > threshold).to(x.dtype)
            ctx.save_for_backward(kept)
            return x * kept

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
            (kept,) = ctx.saved_tensors
            return grad * kept / kept.mean(-1, keepdim=True), None

    class Top(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Keep.apply(x, 0.1)  # here

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(6, 12)
            self.top = Top()
            self.decode = nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(self.top(torch.tanh(self.encode(x))))

    torch.manual_seed(8)
    model = Net()
    with torch.no_grad():
        model.encode.weight.abs_()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(5):
            x = torch.rand(4, 6)
            if step == 3:
                x[0] = -50.0
            loss = F.mse_loss(model(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)
