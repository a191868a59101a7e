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

SECRET_OPTIONS = ("tlscertificatekeyfilepassword", "ssl_pem_passphrase", "authmechanismproperties")
"""Options of a URL that are passwords, or hold a session's token."""


def secrets_of(url: str) -> set[str]:
    """The strings of `url` that nobody else may read: passwords, as written and decoded."""
    match = USERINFO.match(url)
    userinfo = "" if match is None else match.group()[len(match["scheme"]) : -1]
    options = [option.partition("=") for option in url.partition("?")[2].split("&")]
    named = [value for name, _, value in options if name.lower() in SECRET_OPTIONS]
    written = {userinfo.partition(":")[2], *named, *(v.partition(":")[2] for v in named)}
    return {form for text in written for form in (text, unquote(text)) if form}


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
