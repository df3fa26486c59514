"""What each token of a document stands for, as characters to be shown."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of every token; joined they are the text that the tokenizer decodes the ids to.

    Byte-level tokens may share a character: it stands with the first of them, and the others are empty.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one written in Python, which has no bytes to share
        return [str(tokenizer.decode([token])) for token in ids]
    stream = DecodeStream(skip_special_tokens=False)
    found = [""] * len(ids)
    begun = 0  # the first token of the character that is not complete yet
    for place, token in enumerate(ids):
        text = stream.step(backend, token)
        if text is not None:
            found[begun] = text
            begun = place + 1
    if begun < len(ids):  # it waits for what would complete a replacement character that ends the document
        found[begun] = str(tokenizer.decode(list(ids[begun:])))
    return found
