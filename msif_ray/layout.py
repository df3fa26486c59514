"""Where a run keeps what: the paths under `run_dir` (DESIGN.md §4)."""

from collections.abc import Iterable
from pathlib import Path

from msif_ray.paths import names_matching, path_of


def run_record(run_dir: str) -> Path:
    return path_of(run_dir) / "run.json"


def lease(run_dir: str) -> Path:
    """Which driver is at work here."""
    return path_of(run_dir) / "lease.json"


def factors(run_dir: str, stage: str) -> Path:
    return path_of(run_dir) / "factors" / stage


def factors_manifest(folder: Path) -> Path:
    return folder / "manifest.json"


def basis_file(folder: Path, map_name: str) -> Path:
    """Q_A, Q_S and the eigenvalues of A and S of one map."""
    return folder / "basis" / f"{map_name}.safetensors"


def eigenvalues_file(folder: Path, map_name: str) -> Path:
    """The corrected eigenvalues Λ of one map."""
    return folder / "eigenvalues" / f"{map_name}.safetensors"


def factor_files(folder: Path, maps: Iterable[str]) -> list[Path]:
    """All files of the finished factors of these maps, but the manifest."""
    return [file(folder, name) for name in maps for file in (basis_file, eigenvalues_file)]


def partials(folder: Path, group: int, step: str) -> Path:
    """Partial sums of one step over one group of maps: a folder per partial."""
    return folder / "partials" / f"{group:04d}" / step


def part_file(partial: Path, part: str, rank: int) -> Path:
    """What one rank added to a partial's part: a map, or a heading such as the log-likelihoods."""
    return partial / f"{part}.rank{rank}.safetensors"


def groups(folder: Path) -> Path:
    """How the maps of a fit or of an index are grouped into passes; kept, since the memory that decided it may
    change."""
    return folder / "groups.json"


def group_record(folder: Path, group: int) -> Path:
    """What came of a finished group of maps."""
    return folder / "groups" / f"{group:04d}.json"


def queries(run_dir: str) -> Path:
    return path_of(run_dir) / "queries"


def query_partials(run_dir: str) -> Path:
    """The queries' gradients as the replicas wrote them."""
    return queries(run_dir) / "partials"


def directions(run_dir: str, scored: str) -> Path:
    """The queries carried back to one scored stage."""
    return queries(run_dir) / f"stage={scored}"


def direction_file(folder: Path, map_name: str, queries: tuple[int, int]) -> Path:
    """One map's shard of directions: the queries from the first number to before the second."""
    return folder / f"{queries[0]:06d}-{queries[1]:06d}" / f"{map_name}.safetensors"


def energy_file(folder: Path) -> Path:
    """The rank of each query at each map, and the share of its squared norm that is kept."""
    return folder / "energy.parquet"


def directions_manifest(folder: Path) -> Path:
    return folder / "manifest.json"


def references(run_dir: str, corpus: str) -> Path:
    """What a reference model made of a corpus of preferences."""
    return path_of(run_dir) / "references" / corpus


def block_names(folder: Path, suffix: str) -> set[str]:
    """The ids of the blocks of which `folder` has a file of that suffix: a `reference_block` or an `index_block`."""
    return {Path(name).stem.removeprefix("block-") for name in names_matching(folder, f"block-*{suffix}")}


def reference_block(folder: Path, block: str) -> Path:
    """log π_ref(chosen) − log π_ref(rejected) of each pair of a block, in nats."""
    return folder / f"block-{block}.json"


def candidates(run_dir: str, scored: str) -> Path:
    """The documents that are scored for each query, of the pass whose first entry is `scored`."""
    return path_of(run_dir) / "candidates" / f"stage={scored}.parquet"


def residuals_file(folder: Path) -> Path:
    """The relative residual of each query after each iteration of each stage solved by conjugate gradients."""
    return folder / "residuals.parquet"


def solves(folder: Path) -> Path:
    """What conjugate gradients keep while the queries of a folder of directions are carried back."""
    return folder / "solve"


def solve(folder: Path, stage: str, queries: tuple[int, int]) -> Path:
    """The solve of some queries' systems at one stage."""
    return solves(folder) / stage / f"{queries[0]:06d}-{queries[1]:06d}"


def solve_record(solve: Path) -> Path:
    """How far a solve has come; it names the vectors that count."""
    return solve / "record.json"


def solve_vectors(solve: Path, what: str, map_name: str) -> Path:
    """One map's vectors of a solve: of an iterate, its `answer`, or that of `ekfac`."""
    return solve / what / f"{map_name}.safetensors"


def index(run_dir: str, stage: str) -> Path:
    """The compressed document gradients of one stage's corpus."""
    return path_of(run_dir) / "index" / f"stage={stage}"


def index_manifest(folder: Path) -> Path:
    return folder / "manifest.json"


def metric_file(folder: Path, map_name: str) -> Path:
    """The coordinates of one map's pseudo-tokens in an index."""
    return folder / "metric" / f"{map_name}.safetensors"


def index_group(folder: Path, group: int) -> Path:
    """What one pass over a group of maps wrote."""
    return folder / f"{group:04d}"


def index_block(group: Path, block: str) -> Path:
    return group / f"block-{block}.safetensors"
