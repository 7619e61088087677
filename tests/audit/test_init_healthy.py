"""Models at their usual initialisation: nothing is said of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nanhunt
from nanhunt.targets import Target

transformers = pytest.importorskip("transformers")


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.core = kind(8, 32, 2, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])


class Residual(nn.Module):
    def __init__(self, depth: int, norm: bool = True, zero_last: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(self._block(norm) for _ in range(depth))
        self.head = nn.Linear(16, 10)
        for block in self.blocks if zero_last else ():
            nn.init.zeros_(block[3].weight)

    def _block(self, norm: bool) -> nn.Sequential:
        norms = [nn.BatchNorm2d(16) if norm else nn.Identity() for _ in range(2)]
        first, second = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        return nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class LowRank(nn.Module):
    """A frozen layer with a trained product of two factors beside it, of which one begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(32, 32).requires_grad_(False)
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Gated(nn.Module):
    """Gates and a last layer begin at zero, as in diffusion transformers: training opens one, then the other."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.inner, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        for layer in (self.gate, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.gate(x) * self.inner(x))


class Detector(nn.Module):
    """The bias of its head gives a probability of 0.01, and its gates are held nearly shut."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        nn.init.constant_(self.gate.bias, -6.0)
        nn.init.constant_(self.head.bias, -math.log(99))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.sigmoid(self.gate(x)) * torch.tanh(self.body(x))
        return torch.sigmoid(self.head(x))


def mlp(depth: int, act: type[nn.Module] = nn.ReLU, width: int = 64) -> nn.Sequential:
    layers = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), act())]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def convolutions(depth: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
    for _ in range(depth):
        layers += [nn.BatchNorm2d(16)] if norm else []
        layers += [nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def equal_head() -> nn.Sequential:
    model = mlp(3)
    nn.init.constant_(model[-1].weight, 0.01)
    return model


def small_policy() -> nn.Sequential:
    model = mlp(3, nn.Tanh)
    nn.init.orthogonal_(model[-1].weight, 0.01)
    return model


def hugging(name: str) -> nn.Module:
    small = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    ids = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**small, **ids))
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **ids))
    if name == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(**small, image_size=32, patch_size=8))
    if name == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **ids))
    assert name == "gpt2"
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=6, n_head=4, n_positions=64, **ids))


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 100, (4, 16)), "labels": torch.randint(3, 100, (4, 16))}


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


def vectors(width: int = 64) -> Tensor:
    return torch.randn(64, width)


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16)


HEALTHY = {
    "six layers of relu": (lambda: mlp(6), vectors),
    "twelve layers of relu": (lambda: mlp(12), vectors),
    "twelve layers of tanh": (lambda: mlp(12, nn.Tanh), vectors),
    "six layers of sigmoid": (lambda: mlp(6, nn.Sigmoid), vectors),
    "convolutions": (lambda: convolutions(6, norm=False), images),
    "normalised convolutions": (lambda: convolutions(16, norm=True), images),
    "residual": (lambda: Residual(24), images),
    "residual without norms": (lambda: Residual(8, norm=False), images),
    "residual with zero last layers": (lambda: Residual(6, norm=False, zero_last=True), images),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: torch.randn(8, 50, 8)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randn(8, 50, 8)),
    "encoder": (lambda: encoder(False), lambda: torch.randn(4, 10, 32)),
    "encoder, norm first": (lambda: encoder(True), lambda: torch.randn(4, 10, 32)),
    "transformer": (
        lambda: nn.Transformer(32, 4, 3, 3, 64, batch_first=True),
        lambda: (torch.randn(4, 10, 32), torch.randn(4, 7, 32)),
    ),
    "low-rank factors": (LowRank, lambda: vectors(32)),
    "two zero layers that training opens": (Gated, lambda: vectors(32)),
    "shut gates and a small prior": (Detector, lambda: vectors(32)),
    "a head of equal rows": (equal_head, vectors),
    "a policy with a small head": (small_policy, vectors),
    "bert": (lambda: hugging("bert"), lambda: {"input_ids": tokens()["input_ids"], "labels": torch.arange(4) % 2}),
    "llama": (lambda: hugging("llama"), tokens),
    "gpt2": (lambda: hugging("gpt2"), tokens),
    "t5": (lambda: hugging("t5"), tokens),
    "vit": (lambda: hugging("vit"), lambda: {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.arange(4) % 2}),
    "one sample": (lambda: mlp(4), lambda: torch.randn(1, 64)),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_said_of_a_usual_initialisation(name):
    build, batch = HEALTHY[name]
    report = nanhunt.audit_init(Target(name, build), batch())
    assert [(found.code, found.message) for found in report.findings] == []
    assert not [skip for skip in report.skips if "failed" in skip.reason]


def test_the_detector_is_healthy():
    report = nanhunt.audit_init("detector.small")
    assert report.findings == ()
    assert dict(report.facts)["initialisations"] == "3, seeds 0 to 2"
