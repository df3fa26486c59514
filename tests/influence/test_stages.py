"""Every stage's documents scored through four stages, against the dense reference."""

from collections.abc import Iterator

import models
import pipeline
import pytest
import reference
from four_stages import NAMES, four_stages
from test_dense_reference import QUERIES, package_scores, score_error


@pytest.fixture(scope="module")
def case() -> Iterator[tuple[list[reference.StageSpec], list[dict[str, reference.Fit]], list[pipeline.Factors]]]:
    stages = four_stages()
    names = reference.tracked_names(stages[-1].model)
    yield stages, [reference.fit(stage, names) for stage in stages], [pipeline.fit(stage).factors for stage in stages]


def test_the_stages_differ_as_they_should(case) -> None:
    stages = case[0]
    sizes = [stage.model.config.vocab_size for stage in stages]
    assert sizes == [len(models.VOCABULARY)] * 2 + [len(models.VOCABULARY) + 2] * 2
    ids = [reference.tokenise(stage.tokenizer, QUERIES[0])[0] for stage in stages]
    assert ids[0] == ids[2] != ids[3] and len(ids[3]) == len(ids[2]) + 1
    used = {token for row in stages[2].documents for token in reference.tokenise(stages[2].tokenizer, row)[0]}
    assert used >= {sizes[0], sizes[0] + 1}


@pytest.mark.parametrize("scored", range(4), ids=NAMES)
def test_scores_of_every_stage_equal_the_dense_reference(case, scored: int) -> None:
    stages, fits, factors = case
    documents = stages[scored].documents[:8]
    dense = reference.scores(stages, QUERIES, documents, scored, fits=fits, names=list(fits[0]))
    found = package_scores(stages, factors, documents, scored)
    assert max(score_error(found, dense)) < 1e-9
