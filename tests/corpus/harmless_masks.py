"""Look-alikes: the -inf of attention masks and of padding, which softmax, max and exp take away again."""

import torch
import torch.nn.functional as F
from scenario import Loop, harmless
from torch import Tensor, nn


@harmless("a causal mask: every query sees at least itself, and softmax turns -inf into 0")
def causal_mask_by_masked_fill() -> Loop:
    torch.manual_seed(1)

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width, width)
            self.norm = nn.LayerNorm(width)
            self.register_buffer("future", torch.ones(10, 10, dtype=torch.bool).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
            scores = q @ k.mT / q.shape[-1] ** 0.5
            weights = scores.masked_fill(self.future, float("-inf")).softmax(dim=-1)
            return x + self.out(weights @ v)

    model = nn.Sequential(nn.Embedding(20, 16), Block(16), Block(16), nn.Linear(16, 20))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(4):
            tokens = torch.randint(0, 20, (4, 11))
            optimizer.zero_grad()
            logits = model(tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("the mask is a buffer of 0 and -inf that is added to the scores")
def additive_causal_buffer() -> Loop:
    torch.manual_seed(2)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.register_buffer("bias", torch.full((6, 6), float("-inf")).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            scores = self.q(x) @ self.k(x).transpose(1, 2)
            return F.softmax(scores + self.bias, dim=-1) @ self.v(x)

    model = nn.ModuleDict({"attention": Attention(), "head": nn.Linear(8, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data, target = torch.randn(5, 6, 8), torch.randn(5, 6, 1)

    def run() -> None:
        for _ in range(5):
            loss = F.mse_loss(model["head"](model["attention"](data)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("nn.Transformer.generate_square_subsequent_mask is made of -inf above the diagonal")
def encoder_with_subsequent_mask() -> Loop:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    mask = nn.Transformer.generate_square_subsequent_mask(7)

    def run() -> None:
        for _ in range(3):
            x, y = torch.randn(2, 7, 16), torch.randint(0, 5, (2, 7))
            logits = model[1](model[0](x, mask=mask))
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits.transpose(1, 2), y).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("a padded key is seen by no query, but each row keeps real keys")
def scaled_dot_product_with_bool_mask() -> Loop:
    torch.manual_seed(4)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 16, padding_idx=0)
            self.heads = nn.Linear(16, 48)
            self.head = nn.Linear(16, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            keep = tokens.ne(0)
            q, k, v = self.heads(self.embed(tokens)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
            summed = mixed.transpose(1, 2).flatten(2) * keep.unsqueeze(-1)
            return self.head(summed.sum(1) / keep.sum(1, keepdim=True))

    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters())

    def run() -> None:
        for _ in range(4):
            tokens = torch.randint(1, 30, (6, 9))
            for row, length in enumerate(torch.randint(1, 10, (6,)).tolist()):
                tokens[row, length:] = 0
            loss = F.cross_entropy(model(tokens), tokens[:, 0] % 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("the same with a float mask, 0 or -inf, made anew for every batch")
def scaled_dot_product_with_float_mask() -> Loop:
    torch.manual_seed(5)
    model = nn.ModuleDict({"query": nn.Linear(8, 8), "key": nn.Linear(8, 8), "head": nn.Linear(8, 3)})
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)

    def attend(x: Tensor, lengths: Tensor) -> Tensor:
        padded = torch.arange(x.shape[1]) >= lengths[:, None]
        mask = torch.zeros(padded.shape).masked_fill_(padded, -torch.inf)[:, None, :]
        return F.scaled_dot_product_attention(model["query"](x), model["key"](x), x, attn_mask=mask)

    def run() -> None:
        for step in range(4):
            x, lengths = torch.randn(4, 5, 8), torch.tensor([5, 3, 1, 1 + step])
            logits = model["head"](attend(x, lengths)[:, 0])
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("key_padding_mask with a real key in every row, and the weights asked for")
def multihead_attention_with_key_padding() -> Loop:
    torch.manual_seed(6)

    class Pooler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, dropout=0.1, batch_first=True)
            self.query = nn.Parameter(torch.randn(1, 1, 12) * 0.02)
            self.head = nn.Linear(12, 1)

        def forward(self, x: Tensor, padded: Tensor) -> tuple[Tensor, Tensor]:
            query = self.query.expand(x.shape[0], -1, -1)
            pooled, weights = self.attention(query, x, x, key_padding_mask=padded, need_weights=True)
            return self.head(pooled[:, 0]).squeeze(-1), weights

    model = Pooler()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)

    def run() -> None:
        for _ in range(4):
            x = torch.randn(5, 6, 12)
            padded = torch.arange(6) >= torch.tensor([6, 4, 2, 1, 5])[:, None]
            prediction, weights = model(x, padded)
            assert weights[padded[:, None, :]].eq(0).all()
            optimizer.zero_grad()
            F.mse_loss(prediction, x[:, 0, 0]).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("pytorch's fast path of the encoder packs a padded batch as a nested tensor and pads the result with 0")
def encoder_fast_path_in_evaluation() -> Loop:
    torch.manual_seed(7)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(3, 5, 16)
    padded = torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]

    def run() -> None:
        model.eval()
        for _ in range(3):
            with torch.no_grad():
                assert model(x, src_key_padding_mask=padded).isfinite().all()

    return Loop(model, run)


@harmless("the log of a 0/1 mask is -inf at the zeros, on purpose")
def log_of_the_mask_added_to_scores() -> Loop:
    torch.manual_seed(8)
    model = nn.ModuleDict({"mix": nn.Linear(6, 6, bias=False), "head": nn.Linear(6, 4)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    neighbours = (torch.eye(8) + torch.diag(torch.ones(7), 1)).clamp(max=1.0)

    def run() -> None:
        for _ in range(4):
            nodes = torch.randn(8, 6)
            scores = nodes @ model["mix"](nodes).T + neighbours.log()
            logits = model["head"](torch.softmax(scores, dim=1) @ nodes)
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.arange(8) % 4).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("the log of a one-hot prior: all classes but the known one get the probability 0")
def log_of_one_hot_prior() -> Loop:
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def run() -> None:
        for _ in range(4):
            x, labels = torch.randn(8, 5), torch.randint(0, 4, (8,))
            rival = (labels + 1) % 4
            log_prior = (F.one_hot(labels, 4) + F.one_hot(rival, 4)).log()
            loss = F.nll_loss(F.log_softmax(model(x) + log_prior, dim=-1), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("the border of a max pool is -inf; each window holds real pixels")
def max_pool_padding() -> Loop:
    torch.manual_seed(10)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(3, 2, padding=1))
            self.body = nn.Conv2d(4, 8, 3)
            self.head = nn.Linear(8, 3)

        def forward(self, image: Tensor) -> Tensor:
            x = F.pad(self.body(self.stem(image)).relu(), (1, 1, 1, 1), value=-torch.inf)
            return self.head(F.max_pool2d(x, 2).amax(dim=(2, 3)))

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    def run() -> None:
        for _ in range(3):
            loss = F.cross_entropy(model(torch.randn(4, 1, 12, 12)), torch.tensor([0, 1, 2, 0]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("the maximum over the real tokens of a sentence")
def masked_max_over_tokens() -> Loop:
    torch.manual_seed(11)
    encoder, head = nn.GRU(6, 8, batch_first=True), nn.Linear(16, 2)
    model = nn.ModuleDict({"encoder": encoder, "head": head})
    optimizer = torch.optim.Adam(model.parameters())

    def run() -> None:
        for _ in range(3):
            x, real = torch.randn(4, 5, 6), torch.arange(5) < torch.tensor([5, 1, 3, 2])[:, None]
            states, _ = encoder(x)
            highest = states.masked_fill(~real[..., None], float("-inf")).max(dim=1).values
            lowest = torch.where(real[..., None], states, torch.inf).amin(dim=1)
            optimizer.zero_grad()
            F.cross_entropy(head(torch.cat([highest, lowest], dim=-1)), torch.tensor([0, 1, 1, 0])).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("two masks of the lowest finite number add up to -inf in float32; the rows keep real keys")
def lowest_numbers_that_add_up_to_minus_inf() -> Loop:
    torch.manual_seed(12)
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8), "head": nn.Linear(8, 10)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lowest = torch.finfo(torch.float32).min
    causal = torch.full((6, 6), lowest).triu(1)

    def run() -> None:
        for _ in range(3):
            x = torch.randn(3, 6, 8)
            padding = torch.zeros(3, 1, 6)
            padding[0, :, 4:] = lowest
            scores = model["q"](x) @ model["k"](x).mT + (causal + padding)
            optimizer.zero_grad()
            model["head"](scores.softmax(-1) @ x).square().mean().backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("a pointer network: cross-entropy over logits that are -inf where nothing can be pointed at")
def pointer_with_impossible_targets() -> Loop:
    torch.manual_seed(13)

    class Pointer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.LSTM(3, 8, batch_first=True, bidirectional=True)
            self.score = nn.Bilinear(16, 16, 1)

        def forward(self, x: Tensor, is_visited: Tensor) -> Tensor:
            items, _ = self.items(x)
            asked = items[:, :1].expand_as(items).contiguous()
            return self.score(asked, items).squeeze(-1).masked_fill(is_visited, -torch.inf)

    model = Pointer()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def run() -> None:
        for step in range(4):
            is_visited = torch.zeros(5, 6, dtype=torch.bool)
            is_visited[:, : step + 1] = True
            loss = F.cross_entropy(model(torch.randn(5, 6, 3), is_visited), torch.full((5,), step + 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("graph attention: the maximum of a node without edges stays -inf and is gathered by no edge")
def graph_attention_with_an_isolated_node() -> Loop:
    torch.manual_seed(14)
    model = nn.ModuleDict({"project": nn.Linear(4, 8), "score": nn.Linear(16, 1), "head": nn.Linear(8, 2)})
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=5e-4)
    source, target = torch.tensor([[0, 1, 2, 3, 1, 4], [1, 0, 1, 2, 3, 2]])
    features, labels = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])

    def run() -> None:
        for _ in range(4):
            h = model["project"](features)
            e = F.leaky_relu(model["score"](torch.cat([h[source], h[target]], dim=1)).squeeze(1), 0.2)
            highest = torch.full((6,), float("-inf")).scatter_reduce(0, target, e.detach(), "amax")
            exp = (e - highest[target]).exp()
            total = torch.zeros(6).index_add(0, target, exp)
            mixed = torch.zeros(6, 8).index_add(0, target, (exp / total[target])[:, None] * h[source])
            optimizer.zero_grad()
            F.cross_entropy(model["head"](mixed + h), labels).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("rows without any key are given one before softmax, and are set to 0 after it")
def rows_without_keys_are_guarded() -> Loop:
    torch.manual_seed(15)
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8), "head": nn.Linear(8, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for step in range(4):
            text, image = torch.randn(4, 3, 8), torch.randn(4, 5, 8)
            real = torch.arange(5) < torch.tensor([5, 0, 2, step])[:, None]
            has_any = real.any(dim=1)
            scores = model["q"](text) @ model["k"](image).mT
            scores = scores.masked_fill(~(real | ~has_any[:, None])[:, None, :], float("-inf"))
            mixed = (scores.softmax(-1) @ image) * has_any[:, None, None]
            optimizer.zero_grad()
            (model["head"](text + mixed).squeeze(-1).mean(1) - 1).square().mean().backward()
            optimizer.step()

    return Loop(model, run, optimizer)
