"""What is shown of text that others wrote: names, messages, answers, configs.

Such text may hold codes that a terminal obeys, or characters that change what a line
seems to say. They are shown as the escapes that Python, JSON and bash know.
"""

import shlex

MOST_CHARACTERS = 10_000
"""Most characters that are shown as one piece."""


def printable(text: str, *, keep: str = "", most: int | None = None) -> str:
    r"""Return text without control, format, bidirectional or lone surrogate characters.

    Parameters
    ----------
    text
        Anything; bytes of a file name that are not UTF-8 are shown as ``\xNN``.
    keep
        Characters that are left as they are.
    most
        Characters of a piece at most; what is longer is cut in its middle.
    """
    if most is not None and len(text) > most:
        half, cut = most // 2, len(text) - most
        text = f"{text[:half]}[... {cut} characters ...]{text[-half:]}"
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else _escaped(c) for c in text)


def shell_words(words: list[str]) -> str:
    """Return words as one types them in bash; those that cannot be shown as ``$'...'``."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{printable(escaped)}'"


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python tells a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if 0x7F < code <= 0xFF:  # \xNN would be a byte, to bash too
        return f"\\u{code:04x}"
    return character.encode("unicode_escape").decode()
