"""Healthy learners of sequences: attention, recurrence, scans, and models of transformers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from healthy import Learner, adamw, like
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from detector.mamba import BiMambaStack

WORDS, LENGTH = 13, 10


def counting() -> Tensor:
    """Sentences in which each word is the one after the word before; word 0 is padding."""
    return (torch.randint(WORDS - 1, (8, 1)) + torch.arange(LENGTH)) % (WORDS - 1) + 1


def lengths() -> Tensor:
    return torch.randint(3, LENGTH + 1, (8,)).sort(descending=True).values


def next_word(model: nn.Module) -> Callable[[], Tensor]:
    """The loss of scores for each word that follows."""

    def loss() -> Tensor:
        words = counting()
        return F.cross_entropy(model(words[:, :-1]).float().flatten(0, 1), words[:, 1:].flatten())

    return loss


class Padded(nn.Module):
    """An encoder that does not look at padding, and pools over what is not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        padding = words == 0
        hidden = self.encoder(self.embed(words), src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1)
        return self.head((hidden * kept).sum(1) / kept.sum(1))


def padded() -> Learner:
    model = Padded()

    def loss() -> Tensor:
        words = counting()
        words = words * (torch.arange(LENGTH) < lengths()[:, None])
        return F.cross_entropy(model(words).float(), words[:, 0])

    return adamw(model, loss)


class Causal(nn.Module):
    """A decoder by hand: scores of later words are -inf, and the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(WORDS, 24), nn.LayerNorm(24)
        self.mix, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.head = nn.Linear(24, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.embed(words)
        queries, keys, values = self.mix(self.norm(hidden)).chunk(3, -1)
        later = torch.full((words.shape[1],) * 2, -torch.inf, dtype=queries.dtype).triu(1)
        attended = (queries @ keys.mT / 24**0.5 + later).softmax(-1) @ values
        return self.head(hidden + self.out(attended))


def causal() -> Learner:
    model = Causal()
    return adamw(model, next_word(model))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(WORDS, 12), kind(12, 24, batch_first=True), nn.Linear(24, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(words))[0])


def recurrent(kind: type[nn.RNNBase]) -> Callable[[], Learner]:
    def make() -> Learner:
        model = Recurrent(kind)
        return adamw(model, next_word(model), lr=3e-2)

    return make


class Packed(Recurrent):
    def forward(self, words: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(words), (words != 0).sum(1), batch_first=True)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


def packed() -> Learner:
    model = Packed(nn.GRU)

    def loss() -> Tensor:
        words, many = counting(), lengths()
        words = words * (torch.arange(LENGTH) < many[:, None])
        out = model(words).float()
        return F.cross_entropy(out.mT, words[:, : out.shape[1]].roll(-1, 1), ignore_index=0)

    return adamw(model, loss, lr=3e-2)


class Scan(nn.Module):
    """The detector's bidirectional state space layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.stack, self.head = nn.Linear(3, 16), BiMambaStack(16, 2, 8, 8), nn.Linear(16, 1)

    def forward(self, signals: Tensor) -> Tensor:
        return self.head(self.stack(self.embed(signals))).squeeze(-1)


def scan() -> Learner:
    model = Scan()

    def loss() -> Tensor:
        signals = torch.randn(4, 24, 3)
        labels = (signals.sum(-1).cumsum(1) > 0).float()
        return F.binary_cross_entropy_with_logits(model(like(model, signals)).float(), labels)

    return adamw(model, loss)


class Speech(nn.Module):
    """Frames to words without alignment; the loss sums over alignments, most of which are impossible."""

    def __init__(self) -> None:
        super().__init__()
        self.listen = nn.Sequential(nn.Conv1d(4, 16, 5, padding=2), nn.ReLU(), nn.Conv1d(16, WORDS, 1))

    def forward(self, frames: Tensor) -> Tensor:
        return self.listen(frames).permute(2, 0, 1)


def speech() -> Learner:
    model, sounds = Speech(), torch.randn(WORDS, 4)

    def loss() -> Tensor:
        words = counting()[:, :5]
        frames = sounds[words].repeat_interleave(4, 1).mT + 0.1 * torch.randn(8, 4, 20)
        scores = model(like(model, frames)).float().log_softmax(-1)
        return F.ctc_loss(scores, words, torch.full((8,), 20), torch.full((8,), 5), zero_infinity=True)

    return adamw(model, loss)


def bert() -> Learner:
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForMaskedLM(config).train()

    def loss() -> Tensor:
        words = counting()
        seen = torch.arange(LENGTH) < lengths()[:, None]
        hidden = (torch.rand(8, LENGTH) < 0.3) & seen
        hidden[:, 1] = True
        labels = words.where(hidden, -100)
        return model(input_ids=words.masked_fill(hidden, 0), attention_mask=seen.long(), labels=labels).loss

    return adamw(model, loss)


def _writer(model: Any) -> Learner:
    def loss() -> Tensor:
        words = counting()
        # The first sentence is padded on the left, so that some of its rows may look at nothing.
        seen = torch.ones_like(words)
        seen[0, :3] = 0
        return model(input_ids=words, attention_mask=seen, labels=words.where(seen.bool(), -100)).loss

    return adamw(model, loss)


def gpt2() -> Learner:
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return _writer(transformers.GPT2LMHeadModel(config).train())


def llama(attention: str) -> Callable[[], Learner]:
    def make() -> Learner:
        config = transformers.LlamaConfig(
            vocab_size=WORDS,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            attn_implementation=attention,
        )
        return _writer(transformers.LlamaForCausalLM(config).train())

    return make


SEQUENCES: dict[str, Callable[[], Learner]] = {
    "encoder with padding": padded,
    "decoder with a mask of -inf": causal,
    "lstm": recurrent(nn.LSTM),
    "gru, packed": packed,
    "state space scan": scan,
    "speech without alignment": speech,
    "bert": bert,
    "gpt2": gpt2,
    "llama, eager": llama("eager"),
    "llama, sdpa": llama("sdpa"),
}
