"""What is timed: a random GPT-NeoX, documents of random tokens, and queries."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from msif_ray.influence.batch import Batch, WindowKey


@dataclass(frozen=True)
class Shape:
    """A model's size, and the tokens of a batch that suit it."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    tokens_per_batch: int


SHAPES = {
    "small": Shape(layers=4, hidden=256, heads=4, vocabulary=4096, tokens_per_batch=4096),
    "wide": Shape(layers=4, hidden=1024, heads=16, vocabulary=4096, tokens_per_batch=1024),
    "pythia-160m": Shape(layers=12, hidden=768, heads=12, vocabulary=50304, tokens_per_batch=32768),
    "pythia-1b": Shape(layers=16, hidden=2048, heads=8, vocabulary=50304, tokens_per_batch=16384),
    "pythia-2.8b": Shape(layers=32, hidden=2560, heads=32, vocabulary=50304, tokens_per_batch=4096),
}

# Tokens of the 7,318 World Factbook documents of the demo at every twentieth of them, from the shortest to the longest.
FACTBOOK_LENGTHS = (5, 8, 9, 9, 10, 10, 10, 11, 11, 11, 12, 12, 12, 13, 14, 15, 19, 22, 26, 32, 88)


@dataclass(frozen=True)
class Workload:
    """`documents` of `tokens` each, or, if `ragged`, of lengths distributed as the Factbook's with `tokens` as the
    longest; queries are as long as the documents."""

    shape: Shape
    documents: int = 256
    tokens: int = 128
    ragged: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def model(self) -> GPTNeoXForCausalLM:
        """A model of random weights on the device."""
        shape = self.shape
        config = GPTNeoXConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.hidden,
            max_position_embeddings=max(2048, self.tokens),
            tie_word_embeddings=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )
        torch.manual_seed(self.seed)
        with torch.device(self.device):
            model = GPTNeoXForCausalLM(config)
        return model.to(self.dtype).eval()

    def lengths(self) -> list[int]:
        """Tokens of each document."""
        if not self.ragged:
            return [self.tokens] * self.documents
        last, longest = len(FACTBOOK_LENGTHS) - 1, FACTBOOK_LENGTHS[-1]
        lengths = []
        for document in range(self.documents):
            place = last * (document + 0.5) / self.documents
            low = math.floor(place)
            between = FACTBOOK_LENGTHS[low] + (place - low) * (FACTBOOK_LENGTHS[low + 1] - FACTBOOK_LENGTHS[low])
            lengths.append(max(2, round(between * self.tokens / longest)))
        return lengths

    def batches(self) -> list[Batch]:
        """The documents, longest first, in batches of at most `tokens_per_batch` tokens with padding."""
        return make_batches(self.lengths(), self.shape, self.device, self.seed, "document")

    def queries(self, count: int) -> list[Batch]:
        return make_batches([self.tokens] * count, self.shape, self.device, self.seed + 1, "query")


def make_batches(lengths: Sequence[int], shape: Shape, device: str, seed: int, name: str) -> list[Batch]:
    """Random tokens in right-padded batches of windows of similar length."""
    generator = torch.Generator().manual_seed(seed)
    ordered = sorted(lengths, reverse=True)
    batches, start = [], 0
    while start < len(ordered):
        width = ordered[start]
        some = ordered[start : start + max(1, shape.tokens_per_batch // width)]
        ids = torch.randint(shape.vocabulary, (len(some), width), generator=generator)
        attention = torch.arange(width) < torch.tensor(some)[:, None]
        targets = attention.clone()
        targets[:, 0] = False
        keys = tuple(WindowKey(f"{name} {start + row}", 0) for row in range(len(some)))
        batches.append(Batch(ids * attention, attention, targets, keys).to(device))
        start += len(some)
    return batches
