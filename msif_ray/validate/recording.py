"""What passes over documents saw, kept on disk map by map: so that many methods are compared from one pass each.

A pass over a model costs as much for one map as for all, and all maps' factors, directions and gradients together are
more than memory holds. Kept are a window's inputs and output gradients of every map, in the model's own type.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from msif_ray.corpus.windows import Encoded
from msif_ray.influence.batch import Batch
from msif_ray.influence.capture import Capture, Captured
from msif_ray.influence.modules import LinearMap
from msif_ray.influence.seen import Seen
from msif_ray.store import save_tensors
from msif_ray.tensorfile import TensorFile
from msif_ray.validate.setting import CONTEXT, batches


@dataclass(frozen=True)
class Recording:
    """One pass over `documents`, of which each is one window, in `folder`: a file per batch.

    Raises ValueError for a document that is longer than a window.
    """

    folder: Path
    maps: dict[str, LinearMap]
    documents: Sequence[Encoded]
    tokens_per_batch: int

    def __post_init__(self) -> None:
        if any(len(document.ids) > CONTEXT for document in self.documents):
            raise ValueError(f"a document has more than {CONTEXT} tokens")

    def make(self, model: Callable[[], PreTrainedModel], uniforms: Callable[[Batch], Tensor] | None = None) -> None:
        """Records the batches that are not there yet; `uniforms` draw their labels (default: the data's own)."""
        missing = [(path, batch) for path, batch in self._files() if not path.exists()]
        if not missing:
            return
        with Capture(model(), self.maps) as capture:
            for path, batch in missing:
                captured = capture.run(batch, None if uniforms is None else uniforms(batch))
                tensors = {"losses": captured.losses, "labels": captured.labels}
                for name in self.maps:
                    tensors[f"inputs/{name}"], tensors[f"gradients/{name}"] = captured.vectors(name)
                save_tensors(path, tensors)

    def captured(self, name: str) -> Iterator[Captured]:
        """The pass again, with one map alone."""
        for path, batch in self._files():
            file = TensorFile(path)
            losses, labels, inputs, gradients = (
                file.tensor(each) for each in ("losses", "labels", f"inputs/{name}", f"gradients/{name}")
            )
            rows, columns = batch.predicts.nonzero(as_tuple=True)
            maps = {name: self.maps[name]}
            yield Captured(batch, losses, labels, maps, {name: Seen(inputs, gradients)}, (rows, columns))

    def _files(self) -> list[tuple[Path, Batch]]:
        found = batches(list(self.documents), self.tokens_per_batch)
        return [(self.folder / f"{number:05d}.safetensors", batch) for number, batch in enumerate(found)]
