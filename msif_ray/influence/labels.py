"""Labels sampled from the model (the true Fisher), independent of batching and placement.

A window's uniform numbers depend on (run seed, stage, document id, window) alone; a label is the
inverse of the model's cumulative distribution at one of them (DESIGN.md §2).
"""

import hashlib
import json

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from msif_ray.influence.products import wide

# Entries of probabilities at once: on a CPU what stays in a core's cache, 1 MB of float32.
ENTRIES = {"cpu": 2**18, "cuda": 2**26}
# A label is looked for in two steps: among sums over so many entries, then among the entries of one sum.
RUN = 64


def window_uniforms(seed: int, stage: str, document_id: str, window: int, tokens: int) -> Tensor:
    """One uniform number in [0, 1) for every position of a window: `[tokens]`, float64."""
    key = json.dumps([seed, stage, document_id, window]).encode()
    digest = hashlib.blake2b(key, digest_size=16).digest()
    generator = numpy.random.Generator(numpy.random.Philox(key=int.from_bytes(digest, "little")))
    return torch.from_numpy(generator.random(tokens))


def sample_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Labels `[positions]` (int64) from logits `[positions, vocabulary]` and one uniform number each.

    The label is the number of entries whose cumulative probability is at most u times the total. Cumulative
    probabilities are in float64, but only every 64th is computed, and those of the one run that the label is in.
    """
    at_once = max(1, ENTRIES[logits.device.type] // logits.shape[1])
    uniforms = uniforms.to(logits.device)
    parts = zip(logits.split(at_once), uniforms.split(at_once), strict=True)
    return torch.cat([_sample(wide(part), u) for part, u in parts])


def _sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    vocabulary = logits.shape[1]
    probabilities = functional.pad(logits.softmax(-1), (0, -vocabulary % RUN)).unflatten(1, (-1, RUN))
    ends = probabilities.sum(2).double().cumsum(1)
    threshold = uniforms[:, None] * ends[:, -1:]
    run = torch.searchsorted(ends, threshold, right=True).clamp_(max=ends.shape[1] - 1)
    before = torch.where(run > 0, ends.gather(1, (run - 1).clamp_(min=0)), 0.0)
    inside = probabilities[torch.arange(len(run), device=run.device), run[:, 0]].double().cumsum(1).add_(before)
    label = run * RUN + torch.searchsorted(inside, threshold, right=True)
    return label.squeeze(1).clamp_(max=vocabulary - 1)
