"""Models of the tiny pipeline trained again on parts of its documents, and what they then say of the queries.

Chunks of models are kept, each in a file of its own, and none is trained twice.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from msif_ray.errors import UserError
from msif_ray.influence.batch import Batch
from msif_ray.store import load_tensors, save_tensors
from msif_ray.validate.kept import check_setting
from msif_ray.validate.pipeline import Pipeline, Sizes, make_pipeline, rows
from msif_ray.validate.problem import Scores
from msif_ray.validate.side_by_side import Stack, log_likelihoods, settle, train

PROXIMAL, ADAMW, PRETRAINED = "proximal", "adamw", "pretrained"
FINETUNED = (PROXIMAL, ADAMW)
"""With a real proximal term, and as people do."""

Included = NDArray[np.bool_]


@dataclass(frozen=True)
class Outcomes:
    """Of so many trainings: the documents each read, `included` `[models, documents]`; the queries' log-likelihoods in
    nats by kind of model, `[models, queries]` each; `gradient` `[models]`, see `side_by_side.Settled`."""

    included: Included
    log_likelihoods: dict[str, Scores]
    gradient: Scores


@dataclass(frozen=True)
class Trainings:
    """The trainings of one setting, kept under `folder`, so many models side by side."""

    sizes: Sizes
    seed: int
    folder: Path
    at_once: int
    say: Callable[[str], None]

    def check(self) -> None:
        """Raises UserError where `folder` holds trainings of another setting."""
        check_setting(self.folder, {"sizes": asdict(self.sizes), "seed": self.seed})

    @cached_property
    def pipeline(self) -> Pipeline:
        return make_pipeline(self.sizes, self.seed)

    @cached_property
    def documents(self) -> Batch:
        return rows(self.pipeline.documents)

    @cached_property
    def finetuning(self) -> Batch:
        return rows(self.pipeline.finetuning)

    @cached_property
    def queries(self) -> Batch:
        return rows(self.pipeline.queries)

    @property
    def count(self) -> int:
        return len(self.pipeline.documents)

    def halves(self, models: int) -> Outcomes:
        """At least so many random halves of the documents. A chunk's are drawn by its number alone, so that asking for
        more later adds to those that are there."""
        chunks = range(-(-models // self.at_once))
        return _joined([self._chunk("halves", number, self._drawn(number)) for number in chunks])

    def without(self, name: str, groups: Sequence[Sequence[Sequence[int]]]) -> Outcomes:
        """All documents but those at each list of places, the groups' lists one after another; kept under `name`. All
        lists have the same length. No chunk has lists of two groups, so that more groups later add to those that are
        there."""
        at_once = self.at_once
        chunks = [group[start : start + at_once] for group in groups for start in range(0, len(group), at_once)]
        return _joined(
            [
                self._chunk(name, number, [sorted(set(range(self.count)) - set(places)) for places in chunk])
                for number, chunk in enumerate(chunks)
            ]
        )

    @cached_property
    def final(self) -> dict[str, PreTrainedModel]:
        """The models trained on all documents, by kind: what is attributed."""
        path = self.folder / "final.safetensors"
        if not path.exists():
            stacks, _ = self._train([list(range(self.count))])
            save_tensors(
                path, {f"{kind}/{name}": w for kind, each in stacks.items() for name, w in each.state(0).items()}
            )
        found = load_tensors(path)
        models = {}
        for kind in (PRETRAINED, *FINETUNED):
            models[kind] = make_pipeline(self.sizes, self.seed).model
            models[kind].load_state_dict(
                {name.removeprefix(f"{kind}/"): w for name, w in found.items() if name.startswith(f"{kind}/")}
            )
        return models

    @property
    def documents_loss(self) -> float:
        """Nats per token of the documents under the model that was pre-trained on all of them: near zero where it has
        memorised them."""
        model = self.final[PRETRAINED]
        said = log_likelihoods(Stack.copies(model, 1), self.documents)
        return -float(said.sum()) / int(self.documents.targets.sum())

    def _drawn(self, number: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed} {number}")
        return [sorted(rng.sample(range(self.count), self.count // 2)) for _ in range(self.at_once)]

    def _chunk(self, name: str, number: int, subsets: Sequence[Sequence[int]]) -> Outcomes:
        path = self.folder / name / f"{number:05}.safetensors"
        included = np.zeros((len(subsets), self.count), dtype=bool)
        for row, subset in zip(included, subsets, strict=True):
            row[list(subset)] = True
        if not path.exists():
            stacks, gradient = self._train(subsets)
            found = {kind: log_likelihoods(stack, self.queries) for kind, stack in stacks.items()}
            save_tensors(path, found | {"included": torch.from_numpy(included), "gradient": gradient})
            self.say(f"{name}/{number}: {len(subsets)} models, gradient left {float(gradient.max()):.2f}")
        kept = load_tensors(path)
        if not np.array_equal(kept["included"].numpy(), included):
            mend = f"give the former one, or delete the folder {path.parent}"
            raise UserError(f"{path}: is of other documents, or of another --at-once; {mend}")
        by_kind = {kind: kept[kind].numpy() for kind in (PRETRAINED, *FINETUNED)}
        return Outcomes(included, by_kind, kept["gradient"].numpy())

    def _train(self, subsets: Sequence[Sequence[int]]) -> tuple[dict[str, Stack], Tensor]:
        sizes, seed = self.sizes, self.seed
        start = Stack.copies(self.pipeline.model, len(subsets))
        pretrained = train(start, self.documents, subsets, sizes.pretraining(self.documents), seed)
        questions = [range(len(self.pipeline.finetuning))] * len(subsets)
        adamw = train(pretrained, self.finetuning, questions, sizes.finetuning(self.finetuning), seed)
        settled = settle(pretrained, self.finetuning, sizes.alpha, sizes.settle_steps, sizes.settle_rate)
        return {PRETRAINED: pretrained, PROXIMAL: settled.stack, ADAMW: adamw}, settled.gradient


def _joined(parts: Sequence[Outcomes]) -> Outcomes:
    kinds = parts[0].log_likelihoods
    return Outcomes(
        np.concatenate([part.included for part in parts]),
        {kind: np.concatenate([part.log_likelihoods[kind] for part in parts]) for kind in kinds},
        np.concatenate([part.gradient for part in parts]),
    )
