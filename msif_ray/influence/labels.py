"""Labels sampled from the model (the true Fisher), independent of batching and placement.

A window's uniform numbers depend on (run seed, stage, document id, window) alone; a label is the
inverse of the model's cumulative distribution at one of them (DESIGN.md §2).
"""

import hashlib
import json

import numpy
import torch
from torch import Tensor

# Positions whose float64 cumulative distributions are held at once: 256 x 50,000 entries are 100 MB.
POSITIONS_AT_ONCE = 256


def window_uniforms(seed: int, stage: str, document_id: str, window: int, tokens: int) -> Tensor:
    """One uniform number in [0, 1) for every position of a window: `[tokens]`, float64."""
    key = json.dumps([seed, stage, document_id, window]).encode()
    digest = hashlib.blake2b(key, digest_size=16).digest()
    generator = numpy.random.Generator(numpy.random.Philox(key=int.from_bytes(digest, "little")))
    return torch.from_numpy(generator.random(tokens))


def sample_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Labels `[positions]` (int64) from logits `[positions, vocabulary]` and one uniform number each.

    The label is the number of entries whose cumulative probability is at most u times the total.
    """
    labels = []
    for part, u in zip(logits.split(POSITIONS_AT_ONCE), uniforms.split(POSITIONS_AT_ONCE), strict=True):
        cumulative = part.double().softmax(-1).cumsum(-1)
        threshold = u.to(cumulative.device)[:, None] * cumulative[:, -1:]
        labels.append(torch.searchsorted(cumulative, threshold, right=True).squeeze(-1))
    return torch.cat(labels).clamp_(max=logits.shape[-1] - 1)
