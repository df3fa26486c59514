"""Whether all that an entry of `score` is to score has scores, from what the run says of itself: no corpus is read."""

from msif_ray import layout, stages
from msif_ray.errors import UserError
from msif_ray.ordered import in_order
from msif_ray.paths import exists
from msif_ray.results.facts import Facts, Scored
from msif_ray.results.parts import count_documents, done_blocks, part_files
from msif_ray.tables import FINISH, read_table


def check_complete(facts: Facts, scored: Scored) -> None:
    """Raises UserError for scores that are not finished: of part of the documents, or of no document at all.

    A part's footer says how many documents it has. With candidates that depends on the query, and the blocks that have
    some are known by name.
    """
    if scored.candidates is None:
        queries, parts = len(facts.queries), part_files(facts.run_dir, scored.label)
        there = sum(in_order(lambda path: count_documents(path, queries), (path for _, path in parts)))
        wanted, what = scored.documents, "documents"
    else:
        entries = next(each for each in stages.passes(facts.run) if scored.label in [entry.label for entry in each])
        path = layout.candidates(facts.run_dir, entries[0].label)
        if not exists(path):
            raise UserError(f"{facts.run_dir}: no candidates of {scored.label} there yet; {FINISH}")
        blocks = set(read_table(path, ["block"])["block"].to_pylist())
        there, wanted, what = (
            len(blocks & done_blocks(facts.run_dir, scored.label)),
            len(blocks),
            "blocks of candidates",
        )
    if there < wanted:
        raise UserError(f"{facts.run_dir}: {scored.label} has scores of {there:,} of {wanted:,} {what}; {FINISH}")
