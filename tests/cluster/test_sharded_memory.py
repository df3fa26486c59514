"""No rank of a sharded model ever holds it whole: the peak memory of four processes, measured."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from msif_ray.cluster.sharding import GLOO_COPIES, gathered, load_sharded
from msif_ray.influence.batch import Batch, WindowKey
from msif_ray.influence.capture import Capture
from msif_ray.influence.modules import find_linear_maps

pytestmark = pytest.mark.usefixtures("no_shared_cluster")
CPU = torch.device("cpu")
# 701 MiB in float32; the embedding and the head are its largest weights, each 5 % of it.
CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=13,
    num_attention_heads=16,
    num_key_value_heads=16,
    tie_word_embeddings=False,
)
# As shares of the model. Measured with four ranks: 0.35 while loading, 0.40 in steps; the shard is 0.25, and gloo
# holds up to three copies of a weight while it gathers it. One rank alone: 1.10.
LOADING, STEPS = 0.40, 0.425


def weights() -> list[int]:
    """The sizes of the model's weights, in elements."""
    with torch.device("meta"):
        return [weight.numel() for weight in AutoModelForCausalLM.from_config(CONFIG).parameters()]


def write_checkpoint(folder: Path) -> int:
    """A random model in files of a part of a layer each, never whole in memory; its size in bytes."""
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(CONFIG).state_dict()
    CONFIG.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    for number, (name, weight) in enumerate(weights.items()):
        files[name] = f"model-{number}.safetensors"
        save_file({name: torch.randn(weight.shape, generator=generator) / 32}, folder / files[name], {"format": "pt"})
    total = sum(4 * weight.numel() for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def anonymous() -> int:
    """Bytes of this process's own memory: without the pages of a mapped checkpoint, which the system can drop."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak_above(start: int) -> Iterator[list[int]]:
    """In the list's one place, how far this process's memory rises above `start` meanwhile."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def peaks(folder: str) -> tuple[int, int]:
    """How far this rank's memory rises while it loads its shard, and in three forward and backward passes."""
    import deepspeed  # noqa: F401  # its own memory is not the model's
    import transformers.models.llama.modeling_llama  # noqa: F401

    ids = torch.arange(8)[None]
    targets = ids > 0
    batch = Batch(ids, torch.ones_like(targets), targets, (WindowKey("a", 0),))
    start = anonymous()
    with peak_above(start) as loading:
        model = load_sharded(folder, torch.float32, CPU)
    with peak_above(start) as steps, Capture(model, find_linear_maps(model, None)) as capture:
        for _ in range(3):
            assert capture.run(batch).losses.isfinite().all()
    return loading[0], steps[0]


@pytest.mark.long
def test_no_rank_ever_holds_the_whole_model(tmp_path: Path) -> None:
    total = write_checkpoint(tmp_path)
    for rank, (loading, steps) in enumerate(ranks.run(4, peaks, str(tmp_path))):
        print(f"rank {rank} of 4: {loading / total:.3f} of the model while loading, {steps / total:.3f} in steps")
        assert loading < LOADING * total and steps < STEPS * total
        assert steps == pytest.approx(total / 4 + GLOO_COPIES * 4 * gathered(weights())[0], rel=0.1), "what plans say"
    # The same measurement sees a rank that does hold it.
    ((loading, steps),) = ranks.run(1, peaks, str(tmp_path))
    print(f"one rank alone: {loading / total:.3f} while loading, {steps / total:.3f} in steps")
    assert min(loading, steps) > total
