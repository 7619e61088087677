"""Animals that read sequences: attention, recurrence, embeddings."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from zoo_entry import Entry, Training, mean_square, next_token, normal, plain_step, rows, seeded, tokens, unclipped_step


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 1)

    def forward(self, rows: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(rows.shape[0])
        return self.head(self.encoder(self.embed(rows)[None], mask=causal))


def encoder_alone() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _padding(sentences: Tensor) -> Tensor:
    """The first sentence is three words shorter."""
    padding = torch.zeros(sentences.shape[:2], dtype=torch.bool)
    padding[0, 4:] = True
    return padding


def _padded_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch, src_key_padding_mask=_padding(batch)).square().mean()


def _validating_step(training: Training, batch: Tensor) -> Tensor:
    """Keeps what the model says in evaluation, where torch takes a fused path unless there are hooks."""
    loss = plain_step(training, batch)
    training.model.eval()
    with torch.no_grad():
        training.extras["validation"] = training.model(batch, src_key_padding_mask=_padding(batch))
    training.model.train()
    return loss


class MaskedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(11, 8), nn.Linear(8, 24), nn.Linear(8, 11)
        self.register_buffer("causal", torch.ones(6, 6).triu(1).bool(), persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        queries, keys, values = self.mix(self.words(words)).chunk(3, dim=-1)
        scores = queries @ keys.mT / 8**0.5
        scores.masked_fill_(self.causal, -torch.inf)
        return self.head(scores.softmax(-1) @ values)


class TiedDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.norm = nn.Embedding(11, 8), nn.Linear(8, 24), nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.words(words)
        parts = self.mix(self.norm(hidden)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*parts, is_causal=True, dropout_p=0.1)
        return self.head(hidden + attended.transpose(1, 2).flatten(2))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 6, num_layers=2, dropout=0.2), nn.Linear(6, 1)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.lstm(rows[:, None])[0])


class PackedGru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.gru, self.head = nn.Embedding(11, 4), nn.GRU(4, 5, batch_first=True), nn.Linear(5, 1)

    def forward(self, words: Tensor) -> Tensor:
        lengths = torch.tensor([3, 7])
        packed = pack_padded_sequence(self.words(words), lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return self.head(hidden)


class SparseWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 4, sparse=True)

    def forward(self, words: Tensor) -> Tensor:
        return self.words(words).sum(-1)


def sentences(seed: int) -> Tensor:
    return normal(2, 7, 8, seed=seed)


def _sparse_adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SparseAdam(model.parameters(), lr=1e-2)


SEQUENCES = (
    Entry("transformer-encoder", seeded(Encoder), rows, mean_square),
    Entry("fused-encoder", seeded(encoder_alone), sentences, _padded_loss, step=_validating_step),
    Entry("masked-fill-attention", seeded(MaskedAttention), tokens, next_token),
    Entry("tied-sdpa-decoder", seeded(TiedDecoder), tokens, next_token),
    Entry("lstm", seeded(Lstm), rows, mean_square),
    Entry("packed-gru", seeded(PackedGru), tokens, mean_square),
    Entry("sparse-embedding", seeded(SparseWords), tokens, mean_square, _sparse_adam, unclipped_step),
)
