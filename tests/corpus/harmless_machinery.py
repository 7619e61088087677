"""Look-alikes: half precision, compiled, recomputed, sparse, complex and quantised, all of them healthy."""

import torch
import torch.nn.functional as F
from scenario import Loop, harmless
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@harmless("GradScaler starts too high: the scaled gradients overflow, the step is skipped, the scale settles")
def scaler_that_calibrates_itself() -> Loop:
    torch.manual_seed(100)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)

    def run() -> None:
        before = model[0].weight.detach().clone()
        for _ in range(10):
            x = torch.randn(16, 8)
            with torch.autocast("cpu", dtype=torch.float16):
                prediction = model(x)
            loss = F.mse_loss(prediction.float().squeeze(1), 4 * x[:, 0])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            scaler.step(optimizer)
            scaler.update()
        assert 2.0**6 < scaler.get_scale() < 2.0**20
        assert not torch.equal(before, model[0].weight)

    return Loop(model, run, optimizer)


@harmless("the same without unscaling, and with a small scale that never overflows")
def scaler_that_never_skips() -> Loop:
    torch.manual_seed(101)
    model = nn.ModuleDict({"conv": nn.Conv1d(1, 4, 3), "head": nn.Linear(4, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)

    def run() -> None:
        for _ in range(5):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype=torch.float16):
                h = model["conv"](torch.randn(4, 1, 10)).relu().mean(-1)
                loss = F.cross_entropy(model["head"](h), torch.arange(4) % 2)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() > 64.0

    return Loop(model, run, optimizer)


@harmless("half precision inference within the range of half precision, with a causal mask")
def half_precision_inference() -> Loop:
    torch.manual_seed(102)
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 24)).half().eval()

    def run() -> None:
        mask = torch.full((5, 5), -torch.inf, dtype=torch.float16).triu(1)
        with torch.no_grad():
            for _ in range(3):
                q, k, v = model(torch.randint(0, 10, (2, 5))).chunk(3, -1)
                mixed = torch.softmax(q @ k.mT * 8**-0.5 + mask, dim=-1) @ v
                assert mixed.dtype == torch.float16
                assert mixed.isfinite().all()

    return Loop(model, run)


@harmless("bfloat16 has the range of float32")
def bfloat16_autocast() -> Loop:
    torch.manual_seed(103)
    model = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def run() -> None:
        for _ in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(1e6 * torch.randn(8, 6)), torch.arange(8) % 4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("each block is computed again in the backward pass, with its dropout and its mask")
def checkpointed_blocks() -> Loop:
    torch.manual_seed(104)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk = nn.Linear(8, 16)
            self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.Dropout(0.1), nn.GELU(), nn.Linear(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.qk(x).chunk(2, -1)
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            x = x + (q @ k.mT).masked_fill(future, -torch.inf).softmax(-1) @ x
            return x + self.mlp(x)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for index, block in enumerate(self.blocks):
                x = checkpoint(block, x, use_reentrant=index == 1)
            return x

    model = nn.Sequential(nn.Linear(4, 8), Stack(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def run() -> None:
        for _ in range(3):
            x = torch.randn(2, 5, 4)
            optimizer.zero_grad()
            F.mse_loss(model(x).squeeze(-1), x.cumsum(1)[..., 0]).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("torch.compile with a backend that runs torch's own operations", slow=True)
def compiled_by_the_eager_backend() -> Loop:
    torch.manual_seed(105)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def run() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(compiled(torch.randn(8, 4)), torch.arange(8) % 2).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("torch.compile with its own backward graph, and a mask of -inf in the middle", slow=True)
def compiled_ahead_of_time() -> Loop:
    torch.manual_seed(106)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(4, 6)
            self.head = nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            weights = self.score(x).masked_fill(x[:, :1] > 0, -torch.inf).logsumexp(0).exp()
            return self.head(weights.log1p())

    model = Masked()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def run() -> None:
        for _ in range(3):
            x = torch.randn(8, 4)
            x[0, 0] = -1.0
            optimizer.zero_grad()
            compiled(x).square().mean().backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("a layer that multiplies complex weights in the frequency domain")
def complex_spectral_layer() -> Loop:
    torch.manual_seed(107)

    class Spectral(nn.Module):
        def __init__(self, channels: int, modes: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(channels, channels, modes, dtype=torch.cfloat) / channels)

        def forward(self, x: Tensor) -> Tensor:
            spectrum = torch.fft.rfft(x)
            mixed = torch.zeros_like(spectrum)
            modes = self.weight.shape[-1]
            mixed[..., :modes] = torch.einsum("bim,iom->bom", spectrum[..., :modes], self.weight)
            return torch.fft.irfft(mixed, n=x.shape[-1]) + 0.1 * spectrum.abs().mean()

    model = nn.Sequential(nn.Conv1d(1, 4, 1), Spectral(4, 5), nn.GELU(), nn.Conv1d(4, 1, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(4):
            x = torch.randn(3, 1, 16)
            optimizer.zero_grad()
            F.mse_loss(model(x), x.cumsum(-1)).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("embeddings with sparse gradients; the padding row has none")
def sparse_embedding_gradients() -> Loop:
    torch.manual_seed(108)
    embed = nn.EmbeddingBag(50, 8, mode="mean", sparse=True, padding_idx=0)
    head = nn.Linear(8, 2)
    model = nn.ModuleDict({"embed": embed, "head": head})
    sparse, dense = torch.optim.SparseAdam(embed.parameters(), lr=1e-2), torch.optim.Adam(head.parameters())

    def run() -> None:
        for _ in range(4):
            words = torch.randint(0, 50, (6, 7))
            loss = F.cross_entropy(head(embed(words)), words[:, 0] % 2)
            for optimizer in (sparse, dense):
                optimizer.zero_grad()
            loss.backward()
            for optimizer in (sparse, dense):
                optimizer.step()

    return Loop(model, run, sparse)


@harmless("a graph convolution by a sparse adjacency; a node without edges has the degree 0 and a guarded inverse")
def sparse_adjacency() -> Loop:
    torch.manual_seed(109)
    edges = torch.tensor([[0, 1, 1, 2, 3], [1, 0, 2, 1, 3]])
    adjacency = torch.sparse_coo_tensor(edges, torch.ones(5), (5, 5)).coalesce()
    degree = torch.sparse.sum(adjacency, dim=1).to_dense()
    inverse = degree.pow(-0.5)
    inverse[torch.isinf(inverse)] = 0.0
    model = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 2)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def run() -> None:
        x, y = torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 0])
        for _ in range(4):
            scale = degree.pow(-0.5).masked_fill(degree == 0, 0.0)[:, None]
            assert torch.equal(scale[:, 0], inverse)
            h = x
            for layer in model:
                h = scale * torch.sparse.mm(adjacency, scale * layer(h).tanh())
            optimizer.zero_grad()
            F.cross_entropy(h, y).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("integers, booleans and a quantised table: types that know no NaN")
def integer_and_quantised_tensors() -> Loop:
    torch.manual_seed(110)
    model = nn.Sequential(nn.Linear(4, 8), nn.Hardswish(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    table = torch.quantize_per_tensor(torch.randn(20, 4), 0.05, 0, torch.qint8)

    def run() -> None:
        for _ in range(4):
            rows = torch.randint(0, 20, (6,))
            codes = (table.int_repr()[rows].float() * 0.05 * 10).to(torch.int32)
            labels = (codes.sum(1) > 0).long()
            optimizer.zero_grad()
            F.cross_entropy(model(table.dequantize()[rows]), labels).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("packed sequences of unequal length, under weight normalisation")
def packed_sequences() -> Loop:
    torch.manual_seed(111)
    head = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 2))
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 6, batch_first=True), "head": head})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True)

    def run() -> None:
        for _ in range(4):
            lengths = torch.tensor([2, 5, 1, 4])
            x = torch.full((4, 5, 3), torch.nan)
            for row, length in enumerate(lengths.tolist()):
                x[row, :length] = torch.randn(length, 3)
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            _, (last, _) = model["rnn"](packed)
            optimizer.zero_grad()
            F.cross_entropy(head(last[-1]), lengths % 2).backward()
            optimizer.step()

    return Loop(model, run, optimizer)
