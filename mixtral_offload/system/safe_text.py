"""Make text from outside (files, configurations, models, the hub) safe to show.

Control characters act on terminals; bidirectional overrides show text in another order than it has.
"""

from __future__ import annotations

#: control characters; line separators; bidirectional embeddings, overrides and isolates; unpaired surrogates
_UNSAFE = (
    *range(0x20),
    *range(0x7F, 0xA0),
    0x2028,
    0x2029,
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
)
_NAMED = {"\n": "\\n", "\r": "\\r"}
_ONE_LINE = {
    code: _NAMED.get(chr(code), f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
    for code in _UNSAFE
    if chr(code) != "\t"
}
_LINES = {code: text for code, text in _ONE_LINE.items() if chr(code) != "\n"}


def visible(text: str, one_line: bool = False) -> str:
    r"""Replace characters that act on a terminal by visible escapes, such as ``\x1b``.

    Args:
        text: The text to show.
        one_line: Replace newlines too; otherwise they stay, "\r\n" as "\n". Tabs always stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return text.translate(_ONE_LINE) if one_line else text.replace("\r\n", "\n").translate(_LINES)


def shorten(text: str, limit: int) -> str:
    """Replace the middle of a text longer than `limit` characters by a note of how much is missing."""
    if len(text) <= limit:
        return text
    gap = f" ... {len(text) - limit:,} characters left out ... "
    keep = max(limit - len(gap), 0)
    begin = keep * 2 // 3
    return text[:begin] + gap + text[len(text) - (keep - begin) :]


def as_text(value: object) -> str:
    """Return `str(value)`, or a note where that fails, as for integers of thousands of digits."""
    try:
        return str(value)
    except Exception as error:  # `value` may be of any class
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
