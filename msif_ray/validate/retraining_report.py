"""What the retraining experiment leaves: tables, a figure, and what it recommends."""

from pathlib import Path
from typing import Any

from matplotlib import pyplot

from msif_ray.validate.report import write_results
from msif_ray.validate.retrained import ADAMW, FINETUNED, PROXIMAL

TABLES = ("predicted", "recommended", "removed", "solved")
TITLES = {PROXIMAL: "fine-tuned with a proximal term", ADAMW: "fine-tuned with AdamW"}


def write_retraining(folder: Path, found: dict[str, Any]) -> None:
    """`results.json`, a Parquet per table and `retraining.png` under the folder."""
    write_results(folder, found, TABLES, "retraining.png", draw_retraining)


def best_rows(found: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Each method's row with the highest linear datamodeling score, the lowest method first."""
    best: dict[str, dict[str, Any]] = {}
    for row in found["predicted"]:
        if row["kind"] == kind and row["lds"] > best.get(row["method"], {"lds": -2.0})["lds"]:
            best[row["method"]] = row
    return sorted(best.values(), key=lambda row: float(row["lds"]))


def recommendation(row: dict[str, Any]) -> str:
    """A line for the terminal."""
    low, high = row["above_default"]
    strength = f"{row['strength']:g} {row['unit']}"
    return (
        f"{TITLES[row['kind']]}: {row['method']}, damping {row['damping'] or 0:g} × mean, {strength}: "
        f"LDS {row['lds']:.3f}, the defaults {row['default']:.3f} (better by {low:.3f} to {high:.3f})"
    )


def draw_retraining(found: dict[str, Any], path: Path) -> None:
    """By kind of fine-tuning, each method at its best strengths with its 95 % interval, and two stages by damping."""
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained", width_ratios=(3, 2))
    for (left, right), kind in zip(axes, FINETUNED, strict=True):
        rows = [row for row in best_rows(found, kind) if ", rank" not in row["method"] and "both" not in row["method"]]
        sides = [
            [max(0.0, row["lds"] - row["interval"][0]) for row in rows],
            [max(0.0, row["interval"][1] - row["lds"]) for row in rows],
        ]
        names = [row["method"] for row in rows]
        left.barh(names, [row["lds"] for row in rows], xerr=sides, color="#4c72b0", ecolor="#333333")
        left.axvline(0, color="black", linewidth=0.8)
        left.set_title(TITLES[kind])
        left.set_xlabel("linear datamodeling score, best strengths")
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in found["predicted"]:
            if row["kind"] == kind and row["damping"] is not None and ", rank" not in row["method"]:
                curves.setdefault(_curve(row), []).append((row["damping"], row["lds"]))
        for name, points in curves.items():
            if name and len(points) > 1:
                right.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        right.set_xscale("log")
        right.set_xlabel("damping (× mean eigenvalue)")
        right.set_ylabel("linear datamodeling score")
        right.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.savefig(path, format="png", dpi=100)
    pyplot.close(figure)


def _curve(row: dict[str, Any]) -> str:
    """Which line of the figure a row is a point of; "" for none."""
    if row["method"].startswith("single stage"):
        return str(row["method"])
    if row["method"] == "two stages, proximal":
        return f"two stages, α {row['strength']:g} {row['unit']}"
    return ""
