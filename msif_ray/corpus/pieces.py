"""What each token of a document stands for, as characters to be shown."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of every token; joined they are the text that the tokenizer decodes the ids to.

    Byte-level tokens may share a character: it stands with the first of them, and the others are empty. Of ids that are
    cut in the middle of a character, a decoder may break what is whole before it, too; that stays whole here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one written in Python, which has no bytes to share
        return [str(tokenizer.decode([token])) for token in ids]
    stream, since = DecodeStream(skip_special_tokens=False), 0
    found = [""] * len(ids)
    begun = place = 0  # the first token of the character that is not complete yet, and the one to be read
    while place < len(ids):
        try:
            text = stream.step(backend, ids[place])
        except Exception:  # it has no class of its own for a token that changes the text of those before it
            if since == begun:  # nothing has been said that it could change
                raise
            stream, since, place = DecodeStream(skip_special_tokens=False), begun, begun
            continue
        place += 1
        if text is not None:
            found[begun] = text
            begun = place
    if begun < len(ids):  # it waits for what would complete a replacement character that ends the document
        found[begun] = str(tokenizer.decode(list(ids[begun:])))
    return found
