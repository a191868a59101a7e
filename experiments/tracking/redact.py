"""Keep passwords out of whatever is stored or printed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
USERINFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@'\"]*(?:@[^/\s@'\"]*)*@")
"""Whatever stands before the last `@` of a URL's host: a name and password, or a token."""

SHORTEST_SECRET = 6
"""Shorter passwords are hidden inside URLs only: masking every `a` would ruin the record."""


def secrets_of(url: str) -> set[str]:
    """The strings of `url` that nobody else may read: the password, as written and decoded."""
    match = USERINFO.match(url)
    if match is None:
        return set()
    userinfo = match.group()[len(match["scheme"]) : -1]
    password = userinfo.partition(":")[2]
    return {form for form in (password, unquote(password)) if form}


class Redactor:
    """Replace the user information of every URL, and the given secrets, by `***`.

    Args:
        secrets: literal strings to hide; those below `SHORTEST_SECRET` characters are
            hidden only where they stand in a URL.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets = sorted((s for s in secrets if len(s) >= SHORTEST_SECRET), reverse=True)

    def text(self, text: str) -> str:
        """`text` without the secrets."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return USERINFO.sub(rf"\g<scheme>{HIDDEN}@", text) if "@" in text else text

    def tree(self, value: Any) -> Any:
        """A copy of a nested structure with every string redacted, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.tree(key): self.tree(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.tree(item) for item in value]
        return value
