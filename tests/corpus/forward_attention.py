"""Attention whose forward pass leaves its domain: rows without a key, masks made of 0 * inf, empty normalisers."""

import math

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn


@fault(
    "pytorch#41508: a fully padded row", phase="forward", op=("aten::_softmax",), module="encoder.1.attention", step=2
)
def fully_padded_row_in_attention_by_hand() -> Loop:
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            scores = q @ k.mT / math.sqrt(q.size(-1))
            scores = scores.masked_fill(padding[:, None, None, :], -torch.inf)
            weights = scores.softmax(dim=-1)  # here
            return self.out((weights @ v).transpose(1, 2).flatten(2))

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.attention, self.norm = Attention(width, 2), nn.LayerNorm(width)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.norm(x + self.attention(x, padding))

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8, padding_idx=0)
            self.encoder = nn.ModuleList(Layer(8) for _ in range(2))
            self.head = nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            padding = tokens == 0
            x = self.embed(tokens)
            for number, layer in enumerate(self.encoder):
                # The first layer looks at every position, the second only at words.
                x = layer(x, padding if number else torch.zeros_like(padding))
            return self.head(x[:, 0])

    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lengths = [[6, 4, 3], [5, 6, 2], [6, 0, 4], [3, 3, 3]]

    def run() -> None:
        for batch in lengths:
            tokens = torch.randint(1, 20, (3, 6)) * (torch.arange(6) < torch.tensor(batch)[:, None])
            loss = F.cross_entropy(model(tokens), torch.randint(0, 3, (3,)))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("pytorch#41508 with need_weights=True", phase="forward", op=("aten::_softmax",), module="cross", step=3)
def cross_attention_to_an_empty_memory() -> Loop:
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 4, 8))
            self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 2)

        def forward(self, memory: Tensor, is_empty: Tensor) -> dict[str, Tensor]:
            query = self.query.expand(len(memory), -1, -1)
            read, weights = self.cross(query, memory, memory, key_padding_mask=is_empty)  # here
            return {"logits": self.head(read.mean(1)), "weights": weights}

    model = Reader()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(5):
            sizes = torch.tensor([3, 5, 0 if step == 3 else 4])
            is_empty = torch.arange(5) >= sizes[:, None]
            outputs = model(torch.randn(3, 5, 8), is_empty)
            loss = F.cross_entropy(outputs["logits"], torch.randint(0, 2, (3,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "pytorch#41508 in the fused kernel of evaluation",
    phase="forward",
    op=("aten::_native_multi_head_attention",),
    module="attention",
)
def fused_attention_of_evaluation_on_a_padded_row() -> Loop:
    torch.manual_seed(0)

    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            mixed = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]  # here
            return self.head(mixed.sum(1))

    model = Pooling().eval()

    def run() -> None:
        with torch.no_grad():
            for lengths in ([4, 2], [3, 1], [4, 0]):
                padding = torch.arange(4) >= torch.tensor(lengths)[:, None]
                model(torch.randn(2, 4, 8), padding).argmax(-1)

    return Loop(model, run)


@fault(
    "pytorch#41508 in the fused layer of evaluation",
    phase="forward",
    op=("aten::_transformer_encoder_layer_fwd",),
    module="encoder.layers.0",
)
def fused_encoder_layer_of_evaluation_on_a_padded_row() -> Loop:
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.tags = nn.Linear(8, 5)

        def forward(self, *, features: Tensor, padding: Tensor) -> Tensor:
            return self.tags(self.encoder(features, src_key_padding_mask=padding))  # here

    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(2):
            padding = torch.arange(6) >= torch.tensor([[6], [3]])
            logits = model(features=torch.randn(2, 6, 8), padding=padding)
            loss = F.cross_entropy(logits[~padding], torch.randint(0, 5, (9,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            for length in (4, 0):
                model(features=torch.randn(1, 6, 8), padding=torch.arange(6)[None] >= length)

    return Loop(model, run, optimizer)


@fault("(1 - mask) * -inf is NaN where the mask is 1", phase="forward", op=("aten::mul",), module="attention", step=0)
def additive_mask_by_multiplication_with_infinity() -> Loop:
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            bias = (1.0 - keep.float())[:, None, :] * float("-inf")  # here
            return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), attn_mask=bias)

    model = nn.ModuleDict({"attention": Attention(), "head": nn.Linear(8, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for _ in range(2):
            keep = torch.arange(5) < torch.tensor([[5], [3]])
            output = model["head"](model["attention"](torch.randn(2, 5, 8), keep))
            loss = output.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("-inf minus the maximum -inf of the row", phase="forward", op=("aten::sub",), module="attention", step=2)
def stable_softmax_by_hand_of_a_row_without_a_key() -> Loop:
    torch.manual_seed(0)

    def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
        scores = torch.where(mask, scores, -torch.inf)
        shifted = scores - scores.amax(-1, keepdim=True)  # here
        weights = shifted.exp()
        return weights / weights.sum(-1, keepdim=True)

    class GraphAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.source, self.target = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 1)

        def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
            h = self.project(nodes)
            scores = F.leaky_relu(self.source(h) + self.target(h).mT, 0.2)
            return masked_softmax(scores, adjacency) @ h

    model = nn.ModuleDict({"attention": GraphAttention(), "head": nn.Linear(8, 3)})
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def run() -> None:
        for step in range(4):
            adjacency = torch.eye(7, dtype=torch.bool) | (torch.rand(7, 7) < 0.3)
            if step == 2:
                adjacency[4] = False
            logits = model["head"](model["attention"](torch.randn(7, 6), adjacency))
            loss = F.cross_entropy(logits, torch.randint(0, 3, (7,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("softmax without subtracting the maximum", phase="forward", op=("aten::exp",), module="blocks.0.attend", step=2)
def softmax_by_hand_without_subtracting_the_maximum() -> Loop:
    torch.manual_seed(0)

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk = nn.Linear(8, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.qk(x).chunk(2, dim=-1)
            numerator = torch.exp(torch.einsum("bid,bjd->bij", q, k))  # here
            return torch.einsum("bij,bjd->bid", numerator / numerator.sum(-1, keepdim=True), x)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.mix = Attend(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.mix(self.attend(x)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x).mean(1)

    model = Model()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-4)

    def run() -> None:
        for amplitude in (1.0, 2.0, 80.0, 1.0):
            x = amplitude * torch.randn(4, 6, 8)
            loss = (model(x) - 1).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("linear attention with ReLU features: no overlap, 0/0", phase="forward", op=("aten::div",), module="1", step=2)
def linear_attention_without_an_active_feature() -> Loop:
    torch.manual_seed(0)

    class LinearAttention(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.query(x).relu(), self.key(x).relu(), self.value(x)
            context = k.mT @ v
            normaliser = q @ k.sum(1).unsqueeze(-1)
            return (q @ context) / normaliser  # here

    model = nn.Sequential(nn.Linear(3, 8), LinearAttention(8), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].key.weight.abs_()
        model[1].query.weight.abs_()
        model[1].query.bias.zero_().add_(0.1)
        model[1].key.bias.zero_().add_(0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for shift in (5.0, 4.0, -5.0, 5.0):
            x = shift + torch.rand(2, 6, 3)
            loss = F.mse_loss(model(x), torch.zeros(2, 6, 2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("an expert without tokens: mean of an empty slice", phase="forward", op=("aten::mean",), module="moe", step=2)
def mixture_of_experts_with_an_idle_expert() -> Loop:
    torch.manual_seed(0)

    class MixtureOfExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(6, 3)
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
            probabilities = self.router(tokens).softmax(-1)
            choice = probabilities.argmax(-1)
            output, loads = torch.zeros_like(tokens), []
            for number, expert in enumerate(self.experts):
                mine = choice == number
                output[mine] = expert(tokens[mine])
                loads.append(probabilities[mine, number].mean())  # here
            return output, torch.stack(loads).var()

    model = nn.ModuleDict({"moe": MixtureOfExperts()})
    with torch.no_grad():
        model["moe"].router.weight.zero_()[:, :3] = torch.eye(3)
        model["moe"].router.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        for step in range(4):
            kinds = torch.arange(9) % (2 if step == 2 else 3)
            tokens = torch.cat([4.0 * F.one_hot(kinds, 3), torch.randn(9, 3)], dim=1)
            output, imbalance = model["moe"](tokens)
            loss = F.mse_loss(output, tokens) + 0.01 * imbalance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "top-k gates that all fell to capacity, 0/0", phase="forward", op=("aten::div_", "aten::div"), module="gate", step=2
)
def renormalised_gates_of_a_dropped_token() -> Loop:
    torch.manual_seed(0)

    class Gate(nn.Module):
        def __init__(self, capacity: int) -> None:
            super().__init__()
            self.project, self.capacity = nn.Linear(6, 4), capacity

        def forward(self, tokens: Tensor) -> Tensor:
            probabilities = self.project(tokens).softmax(-1)
            top = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(2).indices, 1.0)
            within = (top.cumsum(0) <= self.capacity) * top
            gates = probabilities * within
            gates.div_(gates.sum(-1, keepdim=True))  # here
            return gates

    model = nn.ModuleDict({"gate": Gate(capacity=8), "experts": nn.Linear(6, 4)})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for count in (6, 8, 24, 6):
            tokens = torch.randn(count, 6)
            mixed = (model["gate"](tokens) * model["experts"](tokens)).sum(-1)
            loss = F.huber_loss(mixed, tokens.mean(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)
