"""What loads a model with the head that its stage wants, and has it compute as in training."""

from typing import Any

from msif_ray.errors import UserError


def auto_class(classifies: bool) -> Any:
    """transformers' class for a language model, or for one that classifies texts. Imported where there is a model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if classifies else AutoModelForCausalLM


def load_pretrained(auto: Any, folder: str, dtype: Any) -> Any:
    """The model of a folder's safetensors, or in DeepSpeed's context a shard of it.

    Raises UserError for a tensor that is not there: the run's driver has read other files, on another node.
    """
    options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    model, found = auto.from_pretrained(folder, dtype=dtype, **options)
    if missing := sorted(found["missing_keys"]):  # random now
        raise UserError(f"{folder} has no tensor {missing[0]} on this node; put the same files there on every node")
    return model


def undo_inference(model: Any) -> None:
    """Takes back what a configuration asks of a loaded model for inference alone: RWKV's rescaling of its weights in
    place (`rescale_every`), and tuples for outputs (`return_dict: false`)."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for name, value in (("rescale_every", 0), ("return_dict", True)):
            if hasattr(config, name):
                setattr(config, name, value)
