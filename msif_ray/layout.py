"""Where a run keeps what: the paths under `run_dir` (DESIGN.md §4)."""

from pathlib import Path


def run_record(run_dir: str) -> Path:
    return Path(run_dir) / "run.json"


def factors(run_dir: str, stage: str) -> Path:
    return Path(run_dir) / "factors" / stage


def factors_manifest(folder: Path) -> Path:
    return folder / "manifest.json"


def basis_file(folder: Path, map_name: str) -> Path:
    """Q_A, Q_S and the eigenvalues of A and S of one map."""
    return folder / "basis" / f"{map_name}.safetensors"


def eigenvalues_file(folder: Path, map_name: str) -> Path:
    """The corrected eigenvalues Λ of one map."""
    return folder / "eigenvalues" / f"{map_name}.safetensors"


def partials(folder: Path, step: str) -> Path:
    """Partial sums of one step; each file says which blocks it covers."""
    return folder / "partials" / step


def queries(run_dir: str) -> Path:
    return Path(run_dir) / "queries"


def directions(run_dir: str, scored: str) -> Path:
    """The queries carried back to one scored stage."""
    return queries(run_dir) / f"stage={scored}"


def direction_file(folder: Path, map_name: str) -> Path:
    return folder / f"{map_name}.safetensors"


def directions_manifest(folder: Path) -> Path:
    return folder / "manifest.json"
