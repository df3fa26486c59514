"""One rank: a model (or its shard) on one device, fed with the documents of a block.

It runs in any process: alone in a test, in a replica's actor, or as one of several actors that
hold one model together.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from msif_ray.cluster.jobs import FitJob, Job, Parts, Products, Sums, Work
from msif_ray.cluster.memory import free_memory
from msif_ray.cluster.model_faults import told
from msif_ray.cluster.outcomes import Passed
from msif_ray.cluster.partials import part_metadata
from msif_ray.cluster.sharding import RankGroup, join, load_sharded
from msif_ray.corpus.batches import pack
from msif_ray.corpus.objectives import Classes, Objective, empty_window, encode_for
from msif_ray.corpus.reader import Document
from msif_ray.corpus.switches import switches_of
from msif_ray.corpus.windows import Encoded, Skipped, Window, to_batch, within
from msif_ray.errors import UserError, one_line
from msif_ray.fetch import local_model, local_tokenizer, named
from msif_ray.heap import keep_freed_memory
from msif_ray.influence.batch import Batch, WindowKey
from msif_ray.influence.blocks import Blocks
from msif_ray.influence.capture import Capture
from msif_ray.influence.kept import KEPT_SHARE, KeptPasses
from msif_ray.influence.labels import batch_uniforms
from msif_ray.influence.modules import find_linear_maps
from msif_ray.influence.padded import check_padding
from msif_ray.layout import part_file
from msif_ray.loading import auto_class, load_pretrained, undo_inference
from msif_ray.store import save_tensors


@dataclass(frozen=True)
class ModelSetup:
    """A stage's model and how its documents become batches; all that a rank needs to know of a stage.

    `model` and `tokenizer` are what `fetch.local_model` and `fetch.local_tokenizer` take on the rank's node. The
    `objective` says what the documents are, and so what kind of model reads them.
    """

    stage: str
    model: str
    tokenizer: str
    modules: tuple[str, ...] | None
    dtype: Literal["float32", "bfloat16", "float64"]
    max_tokens: int | None
    append_eos: bool
    tokens_per_batch: int
    seed: int
    threads: int
    cuda: bool
    offload: bool = False
    blocks: Blocks | None = None
    objective: Objective = None

    @property
    def classifies(self) -> bool:
        return isinstance(self.objective, Classes)

    def encode(self, tokenizer: Any, document: Document) -> Encoded | Skipped:
        """A document's tokens, or the reason why it has none."""
        return encode_for(self.objective, tokenizer, document, self.append_eos, self.max_tokens)


class Rank:
    """A model, its tokenizer and the work under way.

    `place` is the rank's in a group that holds one model together: it joins and loads when told to, since an actor
    whose constructor fails cannot say why. Without one, the model is loaded here and now.
    """

    def __init__(self, setup: ModelSetup, place: RankGroup | None = None) -> None:
        self.setup, self.place = setup, place or RankGroup(0, 1, "127.0.0.1", 0)
        self.device = torch.device("cuda" if setup.cuda else "cpu")
        self._work: Work | Parts | None = None
        self._summed: list[list[Window]] = []
        self._sampled = False
        self._kept: KeptPasses | None = None
        self._kept_for: tuple[object, ...] = ()
        if place is None:
            self.load()

    def fetch(self) -> None:
        """Has the files of the model and of the tokenizer on this node."""
        local_model(self.setup.model)
        local_tokenizer(self.setup.tokenizer)

    def load(self) -> None:
        """Loads the model, or this rank's shard of it, and the tokenizer."""
        from transformers import AutoTokenizer  # here: tasks import this module, and need no models
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        # Two cores are quickly oversubscribed: torch and the tokenizers each take all there are.
        torch.set_num_threads(self.setup.threads)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.tokenizer = AutoTokenizer.from_pretrained(local_tokenizer(self.setup.tokenizer), trust_remote_code=False)
        with self._memory("loaded"):
            self.model = self._load()
        undo_inference(self.model)
        self._switches = switches_of(self.model.config)
        self.maps = self._tracked = find_linear_maps(self.model, self.setup.modules, self.setup.blocks)
        if self.setup.classifies:
            with self._memory("used for a text"), self._sound():
                check_padding(self.model, named(self.setup.model))

    def start(self, job: Job) -> None:
        """Begins a job; what an earlier one gathered is dropped."""
        self._work = None
        self._sampled = job.sampled_labels
        self._tracked = self.maps if job.tracked is None else {name: self.maps[name] for name in job.tracked}
        self._keep_for(job)
        with self._memory("given the step's factors"):
            self._work = job.start(list(self._tracked), self.device)

    def process(self, documents: Sequence[Document], again: Mapping[WindowKey, bool] | None = None) -> Passed:
        """Captures this rank's share of the documents' batches and adds them to the work: of all their windows, or of
        those to be processed `again`, each by itself whose loss was not finite.

        Batches depend on the documents alone. Ranks take them in turn; one that runs out makes empty steps, since all
        ranks of a sharded model must take the same number. A batch with a loss that is not finite is left out as a
        whole. Of several windows in one it may be the padding's doing: they are to be processed again.
        """
        encoded, skipped = self._encode(documents)
        windows = {document.document_id: list(self._windows(document)) for document in encoded}
        batches = self._batches(list(chain.from_iterable(windows.values())), again)
        mine = batches[self.place.rank :: self.place.world]
        steps = -(-len(batches) // self.place.world)
        passed = list(zip(mine, self._capture(mine, empty_steps=steps - len(mine)), strict=True))
        if isinstance(self._work, Sums):
            self._summed = [] if again is None else self._summed
            self._summed += [batch for batch, flags in passed if all(flags)]
        left_out = [(batch, flags) for batch, flags in passed if not all(flags)]
        return Passed(
            {document.document_id: len(document.ids) for document in encoded},
            {document: len(own) for document, own in windows.items()},
            tuple(skipped),
            frozenset(batch[0].key.document_id for batch, _ in left_out if len(batch) == 1),
            {w.key: own for batch, flags in left_out if len(batch) > 1 for w, own in zip(batch, flags, strict=True)},
        )

    def summed_with(self, documents: Set[str]) -> int:
        """How many batches of the block under way went into sums with windows of these documents."""
        return sum(_holds(batch, documents) for batch in self._summed)

    def withdraw(self, documents: Set[str], steps: int) -> frozenset[WindowKey]:
        """Takes what the block has given of these documents out of the work again.

        What has gathered is dropped. From sums whole batches are taken off, by the same passes once more, `steps` on
        every rank; gives their windows of other documents, which are to be processed again. What is kept of such a
        batch stays: a later job adds it and takes it off likewise.
        """
        work = self._started()
        if isinstance(work, Work):
            work.drop(documents)
        if not isinstance(work, Sums) or not steps:
            return frozenset()
        batches = [batch for batch in self._summed if _holds(batch, documents)]
        work.negate()
        finite = self._capture(batches, empty_steps=steps - len(batches))
        work.negate()
        if not all(map(all, finite)):
            raise RuntimeError("a batch's losses were finite in one pass and not in another")
        self._summed = [batch for batch in self._summed if not _holds(batch, documents)]
        return frozenset(w.key for batch in batches for w in batch if w.key.document_id not in documents)

    def pack(self, windows: Sequence[Window]) -> list[list[Window]]:
        """The windows in the batches that the model is given."""
        return pack(windows, self.setup.tokens_per_batch, self._switches)

    def take(self) -> Any:
        """What the work has gathered since the last `take`."""
        work = self._started()
        if not isinstance(work, Work):
            raise RuntimeError("sums are written, not taken")
        return work.take()

    def write_sums(self, folder: Path) -> list[str]:
        """Writes the job's sums so far, a file per part, under this rank's number; gives the parts' names."""
        work, written = self._started(), []
        if not isinstance(work, Parts):
            raise RuntimeError("there are no sums to write")
        for part, tensors in work.parts():
            about = part_metadata(folder, part, self.place.rank)
            save_tensors(part_file(folder, part, self.place.rank), tensors, about)
            written.append(part)
        return written

    def free_memory(self) -> int:
        """Bytes that this rank may still take: of its GPU, or its share of what its node's processes may use."""
        return free_memory(self.device, self.setup.threads)

    def _started(self) -> Work | Parts:
        if self._work is None:
            raise RuntimeError("start a job before processing documents")
        return self._work

    def _load(self) -> torch.nn.Module:
        dtype, folder = getattr(torch, self.setup.dtype), local_model(self.setup.model)
        if self.place.world > 1:
            join(self.place, self.device)
            return load_sharded(folder, dtype, self.device, self.setup.offload, self.setup.classifies)
        model = load_pretrained(auto_class(self.setup.classifies), folder, dtype)
        if self.device.type == "cpu":  # a shard's rank has limits of its own: see sharding.ENVIRONMENT
            keep_freed_memory()
        return model.to(self.device)

    def _encode(self, documents: Iterable[Document]) -> tuple[list[Encoded], list[Skipped]]:
        config: Any = self.model.config
        vocabulary = config.get_text_config().vocab_size
        results = [within(self.setup.encode(self.tokenizer, each), vocabulary, self._switches) for each in documents]
        return (
            [result for result in results if isinstance(result, Encoded)],
            [result for result in results if isinstance(result, Skipped)],
        )

    def _windows(self, document: Encoded) -> Iterable[Window]:
        return document.windows(self.setup.max_tokens or len(document.ids))

    @contextmanager
    def _memory(self, what: str) -> Iterator[None]:
        """Turns a GPU's want of memory into what the user can do about it."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"cluster.tokens_per_batch: {named(self.setup.model)} cannot be {what}: the GPU's memory is full; "
                "lower cluster.tokens_per_batch or cluster.factor_memory, or raise cluster.ranks_per_replica "
                f"({one_line(error)})"
            ) from None

    def _sound(self) -> AbstractContextManager[None]:
        """Turns what the model's code raises into one line."""
        return told(named(self.setup.model), self.setup.dtype)

    def _batches(self, windows: Sequence[Window], again: Mapping[WindowKey, bool] | None) -> list[list[Window]]:
        """The batches of all windows, or of those to be processed again: see `process`."""
        if again is None:
            return self.pack(windows)
        alone = [[window] for window in windows if again.get(window.key) is False]
        return self.pack([window for window in windows if again.get(window.key)]) + alone

    def _capture(self, batches: Sequence[Sequence[Window]], empty_steps: int) -> list[list[bool]]:
        """Adds batches to the work, unless a loss is not finite; gives whether each window's is."""
        work = self._started()
        with self._memory("used for a batch"), self._sound(), Capture(self.model, self._tracked) as capture:
            finite = [torch.isfinite(self._add(work, capture, to_batch(windows))).tolist() for windows in batches]
            for _ in range(empty_steps):
                capture.run(to_batch([empty_window(self.setup.objective)]).to(self.device))
        return finite

    def _add(self, work: Work | Parts, capture: Capture, batch: Batch) -> Tensor:
        """One pass over a batch, which goes to the work unless a loss is not finite; gives the losses, `[rows]`."""
        if isinstance(work, Products):
            return work.pass_over(capture, batch.to(self.device))
        captured = None if self._kept is None else self._kept.find(batch)
        if captured is None:
            uniforms = batch_uniforms(self.setup.seed, self.setup.stage, batch) if self._sampled else None
            captured = capture.run(batch.to(self.device), uniforms)
            if not torch.isfinite(captured.losses).all():
                return captured.losses
            if self._kept is not None:
                self._kept.offer(captured)
        work.add(captured)
        return captured.losses

    def _keep_for(self, job: Job) -> None:
        """Goes on with what is kept where the job sees the same as the one before, or begins anew.

        Only on a CPU: a GPU repeats a pass sooner than it has room. And only with the model in one piece, since the
        ranks of a sharded one take every pass together.
        """
        may_keep = isinstance(job, FitJob) and self.device.type == "cpu" and self.place.world == 1
        kept_for = (job.sampled_labels, job.tracked) if may_keep else ()
        if kept_for and kept_for == self._kept_for:
            return
        self._kept, self._kept_for = None, kept_for
        if isinstance(job, FitJob) and may_keep:
            memory = int(KEPT_SHARE * self.free_memory()) if job.memory is None else job.memory
            self._kept = KeptPasses(memory)


def _holds(batch: Sequence[Window], documents: Set[str]) -> bool:
    return any(window.key.document_id in documents for window in batch)
