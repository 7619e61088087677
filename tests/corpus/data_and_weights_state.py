"""Weights that are non-finite before the loop: parameters, buffers, plain attributes, and averaged copies."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn


@fault(
    "a checkpoint saved after the divergence", phase="weights", module="encoder.0", tensor="encoder.0.weight", step=0
)
def checkpoint_with_a_nan_weight() -> Loop:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            encoded = self.encoder(x)  # here
            return self.head(encoded)

    before = Model()
    with torch.no_grad():
        before.encoder[0].weight[3, 1] = torch.nan
    model = Model()
    with TemporaryDirectory() as folder:
        torch.save(before.state_dict(), Path(folder) / "last.pt")
        model.load_state_dict(torch.load(Path(folder) / "last.pt", weights_only=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(3):
            loss = F.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 2, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("an infinite batch left its mean behind", phase="weights", module="body.norm", tensor="body.norm.running_mean")
def running_mean_of_an_infinite_batch() -> Loop:
    torch.manual_seed(0)

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)).relu()  # here

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Body(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).mean((2, 3)))

    model = Model()
    with torch.no_grad():
        model.body.norm.running_mean[2] = -torch.inf
    model.eval()

    def run() -> None:
        with torch.inference_mode():
            for _ in range(2):
                model(torch.rand(2, 1, 8, 8)).softmax(-1)

    return Loop(model, run)


@fault("a table of positions with 0 * log 0", phase="weights", module="position", tensor="position.table", step=2)
def table_of_positions_with_nan_beyond_some_length() -> Loop:
    torch.manual_seed(0)

    class Position(nn.Module):
        def __init__(self, width: int, length: int) -> None:
            super().__init__()
            table = torch.randn(length, width)
            table[12:] = torch.nan
            self.register_buffer("table", table)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table[: x.size(1)]  # here

    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(7, 6))
    model.add_module("position", Position(6, 16))
    model.add_module("head", nn.Linear(6, 7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for length in (8, 12, 15):
            tokens = torch.randint(0, 7, (2, length))
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("a teacher averaged with the weight 0/0", phase="weights", module="teacher.head", tensor="teacher.head.bias")
def averaged_teacher_poisoned_and_used_in_evaluation() -> Loop:
    torch.manual_seed(0)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)))  # here

    class MeanTeacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = Network()
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.student(x) if self.training else self.teacher(x)

    model = MeanTeacher()
    model.teacher.head.bias[1] = torch.nan
    optimizer = torch.optim.Adam(model.student.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(3):
            loss = F.cross_entropy(model.train()(torch.randn(6, 5)), torch.randint(0, 2, (6,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            model.eval()(torch.randn(6, 5)).argmax(-1)

    return Loop(model, run, optimizer)


@fault("an averaged copy beside the model", phase="weights", tensor="weight")
def averaged_copy_beside_the_model_used_as_target() -> Loop:
    torch.manual_seed(0)

    class QNetwork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Sequential(nn.Linear(4, 16), nn.ReLU()), nn.Linear(16, 2)

        def forward(self, state: Tensor) -> Tensor:
            features = self.trunk(state)
            return self.head(features)  # here

    online = QNetwork()
    target = torch.optim.swa_utils.AveragedModel(online).eval()
    with torch.no_grad():
        target.module.head.weight[0, 0] = torch.inf
    optimizer = torch.optim.RMSprop(online.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(3):
            state, action, reward = torch.randn(8, 4), torch.randint(0, 2, (8, 1)), torch.rand(8)
            value = online(state).gather(1, action).squeeze(1)
            with torch.no_grad():
                bootstrap = reward + 0.99 * target(torch.randn(8, 4)).amax(1)
            loss = F.mse_loss(value, bootstrap)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(online, run, optimizer)


@fault("statistics kept as a plain attribute", phase="weights", module="scaler", tensor="deviation", step=0)
def plain_tensor_attribute_that_is_infinite() -> Loop:
    torch.manual_seed(0)

    class Scaler(nn.Module):
        def __init__(self, mean: Tensor, deviation: Tensor) -> None:
            super().__init__()
            self.mean, self.deviation = mean, deviation

        def forward(self, x: Tensor) -> Tensor:
            return x * self.deviation + self.mean  # here

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 3)
            self.scaler = Scaler(torch.zeros(3), torch.tensor([1.0, torch.inf, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.scaler(self.net(x))

    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(3):
            loss = F.l1_loss(model(torch.randn(5, 3)), torch.randn(5, 3))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("one NaN row of a matrix shared by two modules", phase="weights", tensor="weight", step=0)
def tied_weight_with_a_nan_row() -> Loop:
    torch.manual_seed(0)

    class TiedModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.mix(self.embed(tokens)))  # here

    model = TiedModel()
    with torch.no_grad():
        model.embed.weight[8] = torch.nan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for _ in range(2):
            tokens = torch.randint(0, 8, (3, 5))
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("frozen word vectors, one of them missing", phase="weights", module="words", tensor="words.weight", step=3)
def nan_row_of_a_frozen_embedding_hit_later() -> Loop:
    torch.manual_seed(0)

    class Classifier(nn.Module):
        def __init__(self, vectors: Tensor) -> None:
            super().__init__()
            self.words = nn.Embedding.from_pretrained(vectors, freeze=True)
            self.head = nn.Linear(vectors.size(1), 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.words(tokens).mean(1))  # here

    vectors = torch.randn(30, 5)
    vectors[29] = torch.nan
    model = Classifier(vectors)
    optimizer = torch.optim.Adam(model.head.parameters(), lr=1e-2)

    def run() -> None:
        for step in range(5):
            tokens = torch.randint(0, 29, (4, 6))
            if step == 3:
                tokens[2, 5] = 29
            loss = F.cross_entropy(model(tokens), torch.randint(0, 2, (4,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("an observer that has seen nothing", phase="weights", module="observer", tensor="lowest")
def quantisation_range_that_was_never_calibrated() -> Loop:
    torch.manual_seed(0)

    class Observer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("lowest", torch.tensor(torch.inf))
            self.register_buffer("highest", torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            scale = (self.highest - self.lowest) / 255  # here
            return torch.round(x / scale) * scale

    model = nn.Sequential()
    model.add_module("first", nn.Linear(4, 4))
    model.add_module("observer", Observer())
    model.add_module("second", nn.Linear(4, 2))
    model.eval()

    @torch.no_grad()
    def run() -> None:
        for _ in range(2):
            model(torch.randn(3, 4)).argmax(-1)

    return Loop(model, run)


@fault("never initialised", phase="weights", module="adapters.1", tensor="adapters.1.scale", step=2)
def adapter_never_initialised_and_used_later() -> Loop:
    torch.manual_seed(0)

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((4,), torch.nan), requires_grad=False)
            self.shift = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            scaled = x * self.scale  # here
            return scaled + self.shift

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(3, 4)
            self.adapters = nn.ModuleList([Adapter(), Adapter()])
            with torch.no_grad():
                self.adapters[0].scale.fill_(1.0)

        def forward(self, x: Tensor, *, task: int) -> Tensor:
            return self.adapters[task](self.base(x)).sum(-1)

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for task in (0, 0, 1, 0):
            x = torch.randn(5, 3)
            loss = F.binary_cross_entropy_with_logits(model(x, task=task), torch.ones(5))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)
