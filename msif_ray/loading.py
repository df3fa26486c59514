"""What loads a model with the head that its stage wants, and has it compute as in training."""

from typing import Any


def auto_class(classifies: bool) -> Any:
    """transformers' class for a language model, or for one that classifies texts. Imported where there is a model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if classifies else AutoModelForCausalLM


def undo_inference(model: Any) -> None:
    """Takes back what a configuration asks of a loaded model for inference alone: RWKV's rescaling of its weights in
    place (`rescale_every`), and tuples for outputs (`return_dict: false`)."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for name, value in (("rescale_every", 0), ("return_dict", True)):
            if hasattr(config, name):
                setattr(config, name, value)
