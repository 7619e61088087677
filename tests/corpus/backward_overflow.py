"""Gradients that leave the range of their type, and faults on the way through recurrent, sparse and tied layers."""

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn

DIV = ("aten::div", "aten::div_")
MATMUL = ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul")
ADD = ("aten::add", "aten::add_")


@fault("a sum of 400 * 30 over 512 rows exceeds 65504", phase="backward", op=MATMUL, module="body.2", step=3)
def weight_gradient_of_a_half_model_overflows() -> Loop:
    torch.manual_seed(0)

    class Regressor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)  # here

    model = Regressor().half()
    nn.init.constant_(model.body[2].weight, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    targets = [torch.zeros(512, 1), torch.zeros(512, 1), torch.ones(512, 1), torch.full((512, 1), -200.0)]

    def run() -> None:
        for target in targets:
            x = 30 * torch.rand(512, 4).half()
            loss = F.mse_loss(model(x).float(), target, reduction="sum")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("3 ** 128 exceeds 3.4e38: a linear recurrence around 0", phase="backward", op=MATMUL, module="cell", step=3)
def gradient_through_time_overflows() -> Loop:
    class Cell(nn.Module):
        def __init__(self, inputs: int, width: int) -> None:
            super().__init__()
            self.inputs = nn.Linear(inputs, width, bias=False)
            self.recurrent = nn.Parameter(3.0 * torch.eye(width))

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            drive = self.inputs(x)
            return torch.tanh(drive + h @ self.recurrent)  # here

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Cell(2, 4)
            self.head = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), 4)
            for frame in x.unbind(1):
                h = self.cell(frame, h)
            return self.head(h)

    torch.manual_seed(1)
    model = Recurrent()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def run() -> None:
        for length in (8, 16, 32, 128, 8):
            silence = torch.zeros(3, length, 2)
            loss = (model(silence) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("the same in nn.RNN, with a recurrence that grew to 6", phase="backward", op=MATMUL, module="rnn", step=2)
def library_recurrence_over_a_long_silence() -> Loop:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(3, 6, batch_first=True, bias=False)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.rnn(x)  # here
            return self.head(out[:, -1])

    torch.manual_seed(2)
    model = Classifier()
    with torch.no_grad():
        model.rnn.weight_hh_l0.copy_(6 * torch.eye(6))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def run() -> None:
        for length in (5, 10, 90):
            logits = model(torch.zeros(4, length, 3))
            loss = F.cross_entropy(logits, torch.tensor([0, 1, 1, 0]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("spread of a GRU's outputs over one frame is sqrt(0)", phase="backward", op=DIV, module="pool", step=2)
def variance_pooling_of_a_sequence_of_one_frame() -> Loop:
    class VariancePool(nn.Module):
        def forward(self, outputs: Tensor, lengths: Tensor) -> Tensor:
            inside = (torch.arange(outputs.shape[1])[None] < lengths[:, None]).unsqueeze(-1)
            mean = (outputs * inside).sum(1) / lengths[:, None]
            square = ((outputs - mean[:, None]) ** 2 * inside).sum(1) / lengths[:, None]
            return torch.cat([mean, square.sqrt()], dim=1)  # here

    class Sentiment(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 5, padding_idx=0)
            self.gru = nn.GRU(5, 4, batch_first=True, bidirectional=True)
            self.pool = VariancePool()
            self.head = nn.Linear(16, 1)

        def forward(self, tokens: Tensor) -> Tensor:
            outputs, _ = self.gru(self.embed(tokens))
            return self.head(self.pool(outputs, (tokens != 0).sum(1)))

    torch.manual_seed(3)
    model = Sentiment()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sentences = torch.randint(1, 20, (4, 3, 7))
    sentences[:, 1, 4:] = 0
    sentences[2, 0, 1:] = 0

    def run() -> None:
        for tokens in sentences:
            logits = model(tokens).squeeze(1)
            loss = F.binary_cross_entropy_with_logits(logits, torch.tensor([1.0, 0.0, 1.0]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("LSTM cell by hand: the norm of a state that is 0", phase="backward", op=DIV, module="memory", step=2)
def lstm_cell_with_a_normalised_state() -> Loop:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(3, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = c = x.new_zeros(x.shape[1], 5)
            for frame in x:
                h, c = self.cell(frame, (h, c))
                length = c.mul(c).sum(1, keepdim=True).sqrt_()  # here
                c = c / length.clamp_min(1.0)
            return h

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = Memory()
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.memory(x))

    torch.manual_seed(4)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, nesterov=True, momentum=0.5)
    recordings = torch.randn(4, 6, 2, 3)
    recordings[2, :2, 1] = 0.0

    def run() -> None:
        for x in recordings:
            loss = F.cross_entropy(model(x), torch.tensor([2, 0]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("TransE (Bordes 2013) on a triple that fits exactly", phase="backward", op=DIV, module="", step=3)
def sparse_gradient_of_a_translation_embedding() -> Loop:
    class TransE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entity = nn.Embedding(30, 4, sparse=True)
            self.relation = nn.Embedding(5, 4, sparse=True)

        def forward(self, head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
            gap = self.entity(head) + self.relation(relation) - self.entity(tail)
            return gap.pow(2).sum(-1).sqrt()  # here

    torch.manual_seed(5)
    model = TransE()
    with torch.no_grad():
        model.relation.weight[4] = 0.0
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=1e-3)
    triples = torch.stack([torch.randint(0, 15, (5, 8)), torch.randint(0, 4, (5, 8)), torch.randint(15, 30, (5, 8))], 1)
    triples[3, :, 6] = torch.tensor([7, 4, 7])

    def run() -> None:
        for head, relation, tail in triples:
            corrupted = tail[torch.arange(8).roll(3)]
            loss = F.relu(1 + model(head, relation, tail) - model(head, relation, corrupted)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("cosine logits by hand over the padding row, which is 0", phase="backward", op=DIV, module="", step=0)
def tied_embedding_with_a_zero_padding_row() -> Loop:
    class LanguageModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(12, 6, padding_idx=0)
            self.mix = nn.GRU(6, 6, batch_first=True)
            self.unembed = nn.Linear(6, 12, bias=False)
            self.unembed.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            h, _ = self.mix(self.embed(tokens))
            weight = self.unembed.weight
            length = (weight * weight).sum(1, keepdim=True).sqrt().clamp(min=1e-6)  # here
            return 10 * h @ (weight / length).T

    torch.manual_seed(6)
    model = LanguageModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    text = torch.randint(1, 12, (3, 4, 9))

    def run() -> None:
        for tokens in text:
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "tanh rounds to 1 in bfloat16, so that sqrt(1 - t * t) is sqrt(0); it is not in float32",
    phase="backward",
    op=DIV,
    module="actor",
    step=2,
)
def sine_from_cosine_under_bfloat16_autocast() -> Loop:
    class Actor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            cosine = torch.tanh(self.layer(x))
            sine = torch.sqrt(1 - cosine * cosine)  # here
            return {"cosine": cosine, "sine": sine}

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
            self.actor = Actor()

        def forward(self, observation: Tensor) -> dict[str, Tensor]:
            return self.actor(self.body(observation))

    torch.manual_seed(7)
    model = Policy()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for scale in (1.0, 1.0, 12.0, 1.0):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(scale * torch.randn(16, 4))
            loss = (out["sine"].float() - 0.5).square().mean() + out["cosine"].float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)
