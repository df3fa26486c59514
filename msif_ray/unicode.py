"""Text that can be encoded, and what only looks like it."""


def is_unicode(value: object) -> bool:
    """Whether a text can be encoded, or all text in a conversation: JSON's escapes and broken files bring lone
    surrogates."""
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts += [*part, *part.values()]
        elif isinstance(part, list):
            parts += part
        elif isinstance(part, str) and not part.isascii() and any("\ud800" <= each <= "\udfff" for each in part):
            return False
    return True
