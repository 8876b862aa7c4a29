"""The one exception the command line turns into exit status 2.

Every message names the file, key or field, what was found, and what to do about it.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches

AGAIN = "What is finished is kept: run the same command again to go on."
"""End of a message about a failure that does not lie in the config."""


_NO_SECRET = "(?<!abfs://)(?<!abfss://)(?!anonymous@)"  # there, a container; nobody
_AUTHORITY = re.compile(rf"""(?<=://)(?:{_NO_SECRET}[^\s/?#"<>]*|[^\s/?#"<>@:]*:[^\s/?#"<>]*)@""")
_SECRET = r"[^=&\s\"<>]*(?:token|key|secret|passw|signature|credential|auth)[^=&\s\"<>]*|sig"
_QUERY = re.compile(rf"""([?&](?:{_SECRET})=)[^&#\s"<>]+""", re.IGNORECASE)


class UserError(ValueError):
    """A mistake the user can mend: bad config, missing data, weights that do not fit.

    Its message shows no credentials, wherever it came by them.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """Message for an unknown name: the closest valid name first, then all of them."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(names) or 'none'}."


def redact(text: str) -> str:
    """The text without the credentials of URIs in it: `user:password@`, and values as in `?token=...`."""
    return _QUERY.sub(r"\1...", _AUTHORITY.sub("", text))


def has_credentials(text: str) -> bool:
    """Whether a text is a URI with credentials in it."""
    return "://" in text and redact(text) != text
