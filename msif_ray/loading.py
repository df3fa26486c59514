"""What loads a model with the head that its stage wants."""

from typing import Any


def auto_class(classifies: bool) -> Any:
    """transformers' class for a language model, or for one that classifies texts. Imported where there is a model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
