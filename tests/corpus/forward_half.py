"""Overflow and underflow of float16, bfloat16 and float8 in the forward pass."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn


@fault("a product beyond 65504 under autocast", phase="forward", op=("aten::addmm",), module="experts.1", step=3)
def linear_layer_overflows_under_autocast() -> Loop:
    torch.manual_seed(0)

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(16, 2)
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            weights = self.gate(x).softmax(-1)
            hidden = [
                expert(x)  # here
                for expert in self.experts
            ]
            return self.head(sum(weights[:, i, None] * h for i, h in enumerate(hidden)))

    model = Mixture()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(5):
            if step == 3:
                with torch.no_grad():
                    model.experts[1].weight.fill_(700.0)
            x, y = torch.randn(8, 16).abs() + 10, torch.randint(0, 4, (8,))
            with torch.autocast("cpu", torch.float16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("E[x^2] - E[x]^2 of 5000 in float16", phase="forward", op=("aten::square", "aten::pow"), module="blocks.1.norm")
def variance_as_a_difference_of_squares_in_half() -> Loop:
    torch.manual_seed(0)

    class Norm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean(-1, keepdim=True)
            squares = x.square()  # here
            variance = squares.mean(-1, keepdim=True) - mean * mean
            return self.weight * (x - mean) * torch.rsqrt(variance + 1e-3)

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm = Norm(width)
            self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 16)
            self.blocks = nn.ModuleList(Block(16) for _ in range(3))

        def forward(self, *, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
            return x

    model = Encoder()
    with torch.no_grad():
        model.blocks[0].mlp[2].bias[3] = 5000.0
    model.half().eval()

    @torch.inference_mode()
    def run() -> None:
        for _ in range(3):
            model(input_ids=torch.randint(0, 10, (2, 6)))

    return Loop(model, run)


@fault("eps of 1e-8 is 0 in float16 and the row is constant", phase="forward", op=("aten::div",), module="norm", step=2)
def layer_norm_by_hand_whose_eps_vanishes_in_half() -> Loop:
    torch.manual_seed(0)

    class LayerNorm(nn.Module):
        def __init__(self, width: int, eps: float = 1e-8) -> None:
            super().__init__()
            self.gain, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), eps

        def forward(self, x: Tensor) -> Tensor:
            centred = x - x.mean(-1, keepdim=True)
            deviation = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
            return self.gain * (centred / deviation) + self.bias  # here

    model = nn.Sequential()
    model.add_module("norm", LayerNorm(12))
    model.add_module("head", nn.Linear(12, 3))
    model.half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        for step in range(4):
            x = torch.randn(6, 12, dtype=torch.float16)
            if step == 2:
                x[4] = 0.5
            loss = F.cross_entropy(model(x).float(), torch.randint(0, 3, (6,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("QK^T exceeds 65504 in float16", phase="forward", op=("aten::bmm",), module="layers.1.attend", step=1)
def attention_scores_overflow_in_half() -> Loop:
    torch.manual_seed(0)

    class Attend(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            scores = torch.matmul(q, k.transpose(-1, -2))  # here
            return torch.softmax(scores / math.sqrt(q.size(-1)), dim=-1) @ v

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.attend = Attend(width)
            self.out = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.out(self.attend(x)))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(64) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Stack().half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(3):
            if step == 1:
                with torch.no_grad():
                    model.layers[1].attend.q.weight.copy_(400 * torch.eye(64))
                    model.layers[1].attend.k.weight.copy_(400 * torch.eye(64))
            x = torch.randn(2, 5, 64, dtype=torch.float16)
            loss = model(x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("bfloat16 reaches 3e38, float16 65504", phase="forward", op=("aten::_to_copy", "aten::to"), module="adapter")
def bfloat16_hidden_state_cast_to_half() -> Loop:
    torch.manual_seed(0)

    class Adapter(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.project = nn.Linear(width, 4).half()

        def forward(self, hidden: Tensor) -> Tensor:
            narrow = hidden.to(dtype=self.project.weight.dtype)  # here
            return self.project(narrow)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(8, 16).bfloat16()
            self.adapter = Adapter(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.adapter(self.base(x.bfloat16()) * 100)

    model = Model().eval()

    def run() -> None:
        with torch.no_grad():
            for scale in (1.0, 10.0, 5e4):
                model(scale * torch.ones(2, 8)).softmax(-1).argmax(-1)

    return Loop(model, run)


@fault(
    "float8_e5m2 ends at 57344",
    phase="forward",
    op=("aten::_to_copy", "aten::to"),
    module="1",
    step=2,
)
def float8_cast_without_a_scale() -> Loop:
    torch.manual_seed(0)

    class Float8Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            quantised = x.to(torch.float8_e5m2)  # here
            weight = self.weight.to(torch.float8_e5m2)
            return F.linear(quantised.to(x.dtype), weight.to(x.dtype), self.bias)

    model = nn.Sequential(nn.Linear(8, 8), Float8Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for amplitude in (1.0, 5.0, 5e5, 1.0):
            x, y = amplitude * torch.randn(16, 8), torch.randint(0, 2, (16,))
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("a 0-dim float32 tensor does not promote float16", phase="forward", op=("aten::mul",), module="", step=0)
def loss_in_half_scaled_by_hand() -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 3)).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_scale = torch.tensor(2.0**17)

    def run() -> None:
        for _ in range(3):
            logits = model(torch.randn(10, 6).half())
            losses = F.cross_entropy(logits, torch.randint(0, 3, (10,)), reduction="none")
            scaled = losses * loss_scale  # here
            optimizer.zero_grad()
            scaled.mean().backward()
            for parameter in model.parameters():
                parameter.grad.div_(loss_scale)
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("finfo.min + finfo.min is -inf", phase="forward", op=("aten::add", "aten::add_"), module="encoder", step=2)
def masks_of_query_and_key_added_in_half() -> Loop:
    torch.manual_seed(0)
    lowest = torch.finfo(torch.float16).min

    @dataclass
    class EncoderOutput:
        logits: Tensor
        attentions: Tensor

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(12, 16), nn.Linear(16, 12)

        def forward(self, *, input_ids: Tensor, attention_mask: Tensor) -> EncoderOutput:
            x = self.embed(input_ids)
            padding = (1.0 - attention_mask.to(x.dtype)) * lowest
            mask = padding[:, None, :] + padding[:, :, None]  # here
            attentions = (x @ x.mT / 4 + mask).softmax(-1)
            return EncoderOutput(self.head(attentions @ x), attentions)

    class MaskedLanguageModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()

        def forward(self, batch: dict[str, Tensor]) -> EncoderOutput:
            return self.encoder(**batch)

    model = MaskedLanguageModel().half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    paddings = [0, 0, 8, 0]

    def run() -> None:
        for padding in paddings:
            ids = torch.randint(0, 12, (2, 8))
            mask = torch.ones(2, 8, dtype=torch.long)
            mask[1, :padding] = 0
            output = model({"input_ids": ids, "attention_mask": mask})
            loss = F.cross_entropy(output.logits.float().flatten(0, 1), ids.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return Loop(model, run, optimizer)
