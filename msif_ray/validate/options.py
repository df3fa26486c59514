"""What an experiment's options must be to each other and to the corpus, looked at before anything is trained.

Each check raises UserError, which names the option and says what would do.
"""

from collections.abc import Mapping, Sequence

from msif_ray.demo.factbook import RELATIONS, build_corpus
from msif_ray.errors import UserError
from msif_ray.validate import pipeline, setting
from msif_ray.validate.experiment import Budget
from msif_ray.validate.removal import Removals


def check_solvers(sizes: setting.Sizes, budget: Budget) -> None:
    """Dampings are distinct and above 0, as the tolerance is, TRAK has as many documents as dimensions, and the corpus
    has so many."""
    _check_heads(sizes.hidden, setting.HEADS)
    _check_dampings(budget.dampings)
    _check_above_zero("--tolerance", budget.tolerance)
    _check_most("--trak", budget.trak, budget.trak_documents, "--trak-documents")
    documents = len(build_corpus())
    for option, count in (
        ("--documents", sizes.documents),
        ("--scored", sizes.scored),
        ("--trak-documents", budget.trak_documents),
    ):
        _check_most(option, count, documents, "documents of the corpus")


def check_facts(dampings: Sequence[float], above_zero: Mapping[str, float]) -> None:
    """Dampings are distinct and above 0, and so are the values of other options."""
    _check_dampings(dampings)
    for option, value in above_zero.items():
        _check_above_zero(option, value)


def check_retraining(sizes: pipeline.Sizes, removals: Removals) -> None:
    """Some countries are held out, and their questions make all groups of removals, whose documents there are."""
    _check_heads(sizes.hidden, pipeline.HEADS)
    _check_above_zero("--alpha", sizes.alpha)
    _check_most("--countries", sizes.countries, len(pipeline.complete_countries()), "with all four facts")
    _check_most("--asked", sizes.asked, sizes.countries - 1, "of --countries that leave one held out")
    if not removals.groups:
        return
    held_out = (sizes.countries - sizes.asked) * len(RELATIONS)
    documents = sizes.countries * len(RELATIONS) * sizes.wordings
    _check_most("--group", removals.queries, held_out, "held-out queries")
    most = held_out // removals.queries
    _check_most("--removal-groups", removals.groups, most, f"that {held_out} held-out queries make by --group")
    most = documents // removals.queries
    _check_most("--removed", removals.documents, most, f"of the {documents} documents for each query of a --group")


def _check_heads(hidden: int, heads: int) -> None:
    if hidden % heads:
        raise UserError(f"--hidden: {hidden} is no multiple of the model's {heads} heads")


def _check_dampings(dampings: Sequence[float]) -> None:
    for damping in dampings:
        _check_above_zero("--damping", damping)
        if dampings.count(damping) > 1:
            raise UserError(f"--damping: {damping} is given twice; give each once")


def _check_above_zero(option: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise UserError(f"{option}: {value} is no number above 0")


def _check_most(option: str, value: int, most: int, what: str) -> None:
    if value > most:
        raise UserError(f"{option}: {value} is more than the {most} {what}")
