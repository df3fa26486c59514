"""The objectives of a checked run's stages: their reference models, and what tells two objectives apart."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msif_ray.checkpoint import Checkpoint, check_checkpoint, load_tokenizer
from msif_ray.config import Index, Preference, Run, Score, Stage
from msif_ray.corpus.windows import last_token
from msif_ray.errors import UserError
from msif_ray.manifests import CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A key that identities of earlier versions do not have.
_LATER = "reference_config_sha256"


def check_references(run: Run, checkpoints: Sequence[Checkpoint]) -> dict[int, Checkpoint]:
    """The reference model of each stage of preferences: the one that it names, or the stage's before.

    Raises UserError, naming the key, for one that is not there or cannot read the stage's tokens.
    """
    found = {}
    for index, stage in enumerate(run.stages):
        if not isinstance(stage.objective, Preference):
            continue
        key, reference = f"stages.{index}.objective.reference", checkpoints[index - 1]
        if stage.objective.reference is not None:
            reference = _named(stage.objective.reference, stage.name, index, run)
        tokenizer = load_tokenizer(checkpoints[index].tokenizer_path, f"stages.{index}.tokenizer")
        if reference.vocabulary < min(last_token(tokenizer) + 1, checkpoints[index].vocabulary):
            raise UserError(
                f"{key}: {reference.model_path} knows {reference.vocabulary} tokens, fewer than {stage.name!r}; "
                "name a reference model with the same tokens"
            )
        _check_same_tokens(tokenizer, reference, stage.name, key)
        entries: list[Score | Index] = [*run.score, *run.index]
        asked = [entry.max_tokens or 0 for entry in entries if entry.stage == stage.name]
        longest = max([stage.fit.max_tokens or 0, *asked])
        if reference.context is not None and longest > reference.context:
            raise UserError(
                f"{key}: max_tokens of {stage.name!r}, {longest}, is more than the {reference.context} tokens of its "
                "context; lower it, or name another reference model"
            )
        found[index] = reference
    return found


def _named(model: str, stage: str, index: int, run: Run) -> Checkpoint:
    key = f"stages.{index}.objective.reference"
    try:
        described = Stage(name=f"{stage}-reference", model=model)
        return check_checkpoint(described, run.modules, key, dtype=run.cluster.dtype)
    except UserError as error:
        raise UserError(str(error).replace(f"{key}.model: ", f"{key}: ", 1)) from None


def _check_same_tokens(tokenizer: "PreTrainedTokenizerBase", reference: Checkpoint, stage: str, key: str) -> None:
    """A reference model is given the stage's own tokens. Raises UserError where its tokenizer numbers one of them
    otherwise; whether a model without a tokenizer was trained on these cannot be told."""
    try:
        numbers = load_tokenizer(reference.tokenizer_path, key).get_vocab()
    except UserError:
        return
    own = sorted(tokenizer.get_vocab().items(), key=lambda each: each[1])
    for token, number in own:
        if numbers.get(token, number) != number:
            raise UserError(
                f"{key}: {reference.model_path} has other tokens than {stage!r}: {token!r} is {numbers[token]} by its "
                f"tokenizer, and {number} by the stage's; name a reference model with the same tokens"
            )


def objective_identity(run: Run, index: int, references: Mapping[int, Checkpoint]) -> dict[str, Any] | None:
    """What gradients of a stage's documents depend on beside its model; None where its loss is a language model's."""
    objective = run.stages[index].objective
    if objective is None:
        return None
    about: dict[str, Any] = objective.model_dump(mode="json", exclude={"reference"})
    if index in references:
        about |= {"reference_sha256": references[index].model_hash, _LATER: references[index].files[CONFIG]}
    return about


def same_objective(kept: Any, objective: dict[str, Any] | None) -> bool:
    """Whether an `objective_identity` that a manifest has kept is a run's; one that an earlier version kept has no hash
    of the reference model's config.json."""
    if objective is not None and isinstance(kept, dict) and _LATER not in kept:
        objective = {key: value for key, value in objective.items() if key != _LATER}
    return bool(kept == objective)
