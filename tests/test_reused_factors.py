"""Factors of another run: taken where they fit, refused by name where they do not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_preflight import Description, describe, folder, pair, resolve

from msif_ray import layout, store
from msif_ray.errors import UserError
from msif_ray.preflight import Resolved

__all__ = ["folder", "pair"]  # fixtures


def save_factors(folder: Path, resolved: Resolved, **changes: Any) -> Path:
    """Factors of the first stage as a run in `other` leaves them, but empty; its folder."""
    other = layout.factors(str(folder / "other"), "pre")
    manifest = {
        "model_sha256": resolved.stages[0].model_hash,
        "files": resolved.stages[0].files,
        "maps": {name: {"shape": list(shape)} for name, shape in resolved.maps.items()},
    }
    for path in layout.factor_files(other, resolved.maps):
        store.write_atomic(path, b"")
    store.write_json(layout.factors_manifest(other), manifest | changes)
    return other


def reusing(folder: Path) -> Description:
    description = describe(folder)
    description["stages"][0]["factors"] = str(folder / "other")
    return description


def test_factors_of_another_run_are_taken_instead_of_its_corpus(folder: Path) -> None:
    save_factors(folder, resolve(describe(folder)))
    resolved = resolve(reusing(folder))
    assert "stages.0" not in resolved.corpora and resolved.reused.keys() == {"pre"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_of_two_and_four_bytes_have_factors_of_one_type(folder: Path, dtype: str) -> None:
    save_factors(folder, resolve(describe(folder)), dtype=dtype)
    assert resolve(reusing(folder)).reused.keys() == {"pre"}


def test_the_tokenizer_of_reused_factors_is_no_more_compared_than_their_corpus(folder: Path) -> None:
    resolved = resolve(describe(folder))
    save_factors(folder, resolved, files=resolved.stages[0].files | {"tokenizer.json": "x"})
    assert resolve(reusing(folder)).warnings == ()


def test_of_older_factors_it_is_said_that_no_more_than_the_weights_is_compared(folder: Path) -> None:
    other = save_factors(folder, resolve(describe(folder)), files=None)
    (said,) = resolve(reusing(folder)).warnings
    assert said.startswith(f"{other} was fitted by an earlier version, ") and said.endswith(": config.json")


BASIS = "basis/gpt_neox.layers.1.mlp.dense_4h_to_h.safetensors"
FACTORS: dict[str, tuple[Callable[[Path, Resolved], object], str]] = {
    "another model": (lambda f, r: save_factors(f, r, model_sha256="x"), "{other} was fitted to another model than"),
    "another configuration": (
        lambda f, r: save_factors(f, r, files=r.stages[0].files | {"config.json": "x"}),
        "{other} was fitted with another config.json than 'pre' has; use the same config.json",
    ),
    "other maps": (lambda f, r: save_factors(f, r, maps={}), "{other} was fitted over other maps; use the same"),
    "another type": (
        lambda f, r: save_factors(f, r, dtype="float64"),
        "{other} was fitted in float64, and cluster.dtype is float32; use the same `dtype`",
    ),
    "none": (lambda f, r: None, "{other} holds no finished factors"),
    "half a manifest": (
        lambda f, r: save_factors(f, r, maps=[]),
        "{other}/manifest.json: not as this version writes it: see maps; finish or repeat the run in {run}",
    ),
    "another stage's manifest": (
        lambda f, r: save_factors(f, r, stage="tune"),
        "{other}/manifest.json: in the wrong place: its stage is tune, not pre; finish or repeat the run in {run}",
    ),
    "a broken manifest": (
        lambda f, r: (save_factors(f, r) / "manifest.json").write_text('{"maps'),
        "{other}/manifest.json: not whole JSON: .*; finish or repeat the run in {run}",
    ),
    "a lost file": (
        lambda f, r: (save_factors(f, r) / BASIS).unlink(),
        f"{{other}}/{BASIS} is not there .*; finish or repeat the run in {{run}}",
    ),
}


@pytest.mark.parametrize("case", FACTORS)
def test_factors_of_another_run_are_checked(folder: Path, case: str) -> None:
    spoil, message = FACTORS[case]
    spoil(folder, resolve(describe(folder)))
    message = message.format(other=folder / "other" / "factors" / "pre", run=folder / "other")
    with pytest.raises(UserError, match=rf"^stages\.0\.factors: {message}") as error:
        resolve(reusing(folder))
    assert "\n" not in str(error.value)
