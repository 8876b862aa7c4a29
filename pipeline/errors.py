"""The one exception the command line turns into exit status 2.

Every message names the file, key or field, what was found, and what to do about it.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches

AGAIN = "What is finished is kept: run the same command again to go on."
"""End of a message about a failure that does not lie in the config."""


class UserError(ValueError):
    """A mistake the user can mend: bad config, missing data, weights that do not fit."""


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """Message for an unknown name: the closest valid name first, then all of them."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(names) or 'none'}."


def redact(text: str) -> str:
    """The text without the `user:password@` of any URI in it."""
    return re.sub(r'(?<=://)[^\s/?#"<>]*@', "", text)
