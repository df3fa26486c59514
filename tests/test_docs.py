"""What README.md and docs/ say of the run description is so, and what they link to is there."""

import re
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml
from pydantic import TypeAdapter

from msif_ray import config
from msif_ray.config import parse_run

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])

SECTIONS: dict[str, type[config.Strict]] = {
    "The run": config.Run,
    "A stage": config.Stage,
    "A strength": config.Strength,
    "Documents": config.Documents,
    "Packed rows": config.Packed,
    "Classification": config.Classification,
    "Preferences": config.Preference,
    "A fit": config.Fit,
    "A proximal response": config.ProximalResponse,
    "An unrolled response": config.UnrolledResponse,
    "An identity response": config.IdentityResponse,
    "The EK-FAC solver": config.EkfacSolver,
    "The solver by conjugate gradients": config.CgSolver,
    "Queries": config.Queries,
    "A score entry": config.Score,
    "Candidates": config.Candidates,
    "An index entry": config.Index,
    "Detail": config.Detail,
    "The cluster": config.Cluster,
    "Replicas": config.Replicas,
}


def sections() -> dict[str, dict[str, tuple[str, str]]]:
    """By heading of docs/configuration.md, by key: its default and what it does, as written."""
    _, *parts = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").split("\n## ")
    row = re.compile(r"^\| `(\w+)` \| (.*?) ?\| (.*?) ?\|$", re.MULTILINE)
    return {part.partition("\n")[0]: {k: (d, w) for k, d, w in row.findall(part)} for part in parts}


def parts_of(kind: Any) -> set[type[config.Strict]]:
    """The classes that a description of this type is made of, itself among them."""
    if isinstance(kind, type) and get_origin(kind) is None:
        if not issubclass(kind, config.Strict):
            return set()
        return {kind}.union(*(parts_of(field.annotation) for field in kind.model_fields.values()))
    arguments = get_args(kind)[:1] if get_origin(kind) is Annotated else get_args(kind)
    return set().union(*(parts_of(each) for each in arguments))


def test_every_part_of_a_description_has_its_section() -> None:
    assert set(SECTIONS.values()) == parts_of(config.Run) and set(sections()) == set(SECTIONS)


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_key_is_told_with_its_default(heading: str) -> None:
    told, fields = sections()[heading], SECTIONS[heading].model_fields
    assert set(told) == set(fields)
    for key, field in fields.items():
        default, meaning = told[key]
        if field.is_required():
            assert default == "*required*"
        elif field.get_default(call_default_factory=True) is None:
            assert default == "" and meaning, f"{key}: say what holds where it is not set"
        else:
            read = TypeAdapter(field.annotation).validate_python(yaml.safe_load(default.strip("`")))
            assert read == field.get_default(call_default_factory=True)


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, fragment = target.partition("#")
        if "://" in path:
            continue
        linked = page if not path else (page.parent / path)
        assert linked.exists(), target
        assert not fragment or fragment in anchors(linked), target


def test_the_readmes_run_is_one() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    run = parse_run(found)
    assert [stage.name for stage in run.stages] == ["pretrain", "finetune"]
    assert run.stages[1].response == config.ProximalResponse(), "the response that it shows is the default"
