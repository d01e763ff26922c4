"""Messages of the library in the words of the command line: its options instead of arguments in Python."""

from __future__ import annotations

import re

_WORDS = {
    r"resume=True(, --resume)?": "--resume",
    r"overwrite=True(, --overwrite)?": "--overwrite",
    r"Learning\.(steps|seed)\b": r"--\1",
    r"Learning\.synchronous": "--synchronous",
    r"Sampling\.uniform": "--uniform",
    r"got n_workers=": "got --workers ",
}


def as_options(message: str) -> str:
    """Return a message that names options.

    >>> as_options("Resume it (resume=True, --resume), or start again (overwrite=True, --overwrite)")
    'Resume it (--resume), or start again (--overwrite)'
    """
    for pattern, option in _WORDS.items():
        message = re.sub(pattern, option, message)
    return message
