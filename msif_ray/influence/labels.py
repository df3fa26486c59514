"""Labels sampled from the model (the true Fisher), independent of batching and placement.

A window's uniform numbers depend on (run seed, stage, document id, window) alone; a label is the
inverse of the model's cumulative distribution at one of them (DESIGN.md §2).
"""

import hashlib
import json

import numpy
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from msif_ray.influence.batch import Batch

# A label is looked for in two steps: among sums over so many entries, then among the entries of one sum.
RUN = 64


def window_uniforms(seed: int, stage: str, document_id: str, window: int, tokens: int) -> Tensor:
    """One uniform number in [0, 1) for every position of a window: `[tokens]`, float64."""
    key = json.dumps([seed, stage, document_id, window]).encode()
    digest = hashlib.blake2b(key, digest_size=16).digest()
    generator = numpy.random.Generator(numpy.random.Philox(key=int.from_bytes(digest, "little")))
    return torch.from_numpy(generator.random(tokens))


def batch_uniforms(seed: int, stage: str, batch: Batch) -> Tensor:
    """One uniform number for every label of a batch, float64, on the CPU: `[targets]`, or `[rows]` of texts that have
    one label each, or of preferences."""
    if batch.has_row_labels:
        return torch.cat([window_uniforms(seed, stage, key.document_id, key.window, 1) for key in batch.keys])
    lengths = batch.attention_mask.sum(1).tolist()
    windows = [
        window_uniforms(seed, stage, key.document_id, key.window, int(length))
        for key, length in zip(batch.keys, lengths, strict=True)
    ]
    return pad_sequence(windows, batch_first=True)[batch.predicts.cpu()]


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Labels `[positions]` (int64) from probabilities `[positions, vocabulary]` and one uniform number each.

    The label is the number of entries whose cumulative probability is at most u times the total. Cumulative
    probabilities are in float64, but only every 64th is computed, and those of the one run that the label is in.
    """
    vocabulary = probabilities.shape[1]
    whole = vocabulary - vocabulary % RUN
    sums = probabilities[:, :whole].unflatten(1, (-1, RUN)).sum(2)
    if whole < vocabulary:
        sums = torch.cat([sums, probabilities[:, whole:].sum(1, keepdim=True)], 1)
    ends = sums.double().cumsum(1)
    threshold = uniforms[:, None] * ends[:, -1:]
    run = torch.searchsorted(ends, threshold, right=True).clamp_(max=ends.shape[1] - 1)
    before = torch.where(run > 0, ends.gather(1, (run - 1).clamp_(min=0)), 0.0)
    entries = run * RUN + torch.arange(RUN, device=run.device)
    inside = probabilities.gather(1, entries.clamp(max=vocabulary - 1)).double()
    inside = inside.masked_fill_(entries >= vocabulary, 0.0).cumsum(1).add_(before)
    label = run * RUN + torch.searchsorted(inside, threshold, right=True)
    return label.squeeze(1).clamp_(max=vocabulary - 1)
