"""Training of small GPT-NeoX models on short texts: the demo's pair, and the models of the validation."""

import logging
import math
import random
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
IGNORED = -100

log = logging.getLogger("training")


class Sequence(NamedTuple):
    """Token ids, and the index of the first token that is a target."""

    tokens: list[int]
    first_target: int


class Schedule(NamedTuple):
    """How to optimise: `tokens_per_batch` counts padding.

    `minutes` ends the schedule by then, learning rate included; the result then depends on the machine.
    """

    epochs: int
    rate: float
    weight_decay: float
    tokens_per_batch: int
    minutes: float = math.inf


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`, which adds no special tokens of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def new_model(vocabulary: int, layers: int, hidden: int, context: int, heads: int | None = None) -> GPTNeoXForCausalLM:
    """A GPT-NeoX with random weights; biases in every linear map, LM head not tied to the embeddings.

    `heads` by default of width 48, as the demo's.
    """
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads or hidden // 48,
        intermediate_size=4 * hidden,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPTNeoXForCausalLM(config)


def batches(sequences: list[Sequence], tokens_per_batch: int, rng: random.Random) -> Iterator[list[Sequence]]:
    """One epoch in random order, in batches of similar lengths, at most `tokens_per_batch` with padding."""
    pool = sorted(sequences, key=lambda sequence: (len(sequence.tokens), rng.random()))
    epoch: list[list[Sequence]] = [[]]
    for sequence in pool:
        if (len(epoch[-1]) + 1) * len(sequence.tokens) > tokens_per_batch and epoch[-1]:
            epoch.append([])
        epoch[-1].append(sequence)
    rng.shuffle(epoch)
    yield from epoch


def batch_loss(model: GPTNeoXForCausalLM, batch: list[Sequence]) -> torch.Tensor:
    """Mean negative log-likelihood of the batch's targets, in nats.

    Right padding needs no attention mask here: attention is causal, and padded positions have no target.
    """
    length = max(len(sequence.tokens) for sequence in batch)
    tokens = torch.zeros(len(batch), length, dtype=torch.long)
    labels = torch.full((len(batch), length), IGNORED)
    for row, (ids, first_target) in enumerate(batch):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, first_target : len(ids)] = torch.tensor(ids[first_target:])
    logits = model(tokens).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def share_of_rate(done: float) -> float:
    """The learning rate as a share of the highest when so much of training is done: 5 % warm-up, cosine to zero."""
    return min(done / 0.05 + 0.01, 0.5 * (1 + math.cos(math.pi * done)))


def optimise(
    name: str, model: GPTNeoXForCausalLM, sequences: list[Sequence], schedule: Schedule, seed: int
) -> tuple[float, float]:
    """Train with AdamW at `share_of_rate`; returns minutes and the last loss in nats/token."""
    rng = random.Random(seed)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=schedule.rate,
        betas=(0.9, 0.98),
        fused=True,  # the same steps in a quarter of the time: 0.5 and not 2.1 s for 106 million weights
    )
    steps = schedule.epochs * len(list(batches(sequences, schedule.tokens_per_batch, random.Random(0))))
    start, step, mean = time.monotonic(), 0, math.nan
    model.train()
    for epoch in range(schedule.epochs):
        total = count = 0.0
        for batch in batches(sequences, schedule.tokens_per_batch, rng):
            minutes = (time.monotonic() - start) / 60
            done = max(step / steps, minutes / schedule.minutes)
            if done >= 1:
                return minutes, mean
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate * share_of_rate(done)
            loss = batch_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total, count, step = total + loss.item(), count + 1, step + 1
        mean = total / count
        log.info("%s epoch %d/%d loss %.4f, %.1f min", name, epoch + 1, schedule.epochs, mean, minutes)
    return (time.monotonic() - start) / 60, mean
