"""Why a database cannot be used, in one line that says what to do."""

from __future__ import annotations

from typing import Any

from pymongo.errors import ConfigurationError, ConnectionFailure, OperationFailure

WRONG_PASSWORD, NOT_ALLOWED, ATLAS = 18, 13, 8000
FULL = (14031, 12501)
"""OutOfDiskSpace, and a quota that is exceeded; Atlas says 8000 for almost anything."""

UNRECORDED = "-u records nothing"


def explain(error: Exception, source: str) -> str:
    """What went wrong; the text may still hold passwords.

    Args:
        error: pymongo's, or of a malformed URL.
        source: where the database's address comes from.
    """
    what, reason = f"the database of {source}", _first(str(error))
    if isinstance(error, OperationFailure):
        return f"{what} {_refusal(error, reason)}"
    if isinstance(error, ConnectionFailure):
        return f"no database answers ({source}): {reason}{_tls(reason)}; {UNRECORDED}"
    if isinstance(error, (ConfigurationError, ValueError)):
        return (
            f"the URL in {source} is not valid; name and password must be"
            " percent-encoded, as in mongodb://NAME:PASSWORD@HOST:PORT/DB"
        )
    return f"{what} cannot be used: {reason}"


def _refusal(error: OperationFailure, reason: str) -> str:
    code, told = _code(error), reason.lower()
    if code in FULL or "quota" in told or "disk space" in told:
        return f"is full ({reason}); make room there, or name another; {UNRECORDED}"
    if code == NOT_ALLOWED:
        return f"does not let this user read and write ({reason}); ask for the role readWrite"
    if code == WRONG_PASSWORD or (code == ATLAS and "auth" in told):
        return "refuses the user name or password"
    return f"does not take the run: {reason}; {UNRECORDED}"


def _code(error: OperationFailure) -> int | None:
    """The code, also of a write that was refused by itself."""
    details: dict[str, Any] = dict(error.details or {})
    written = details.get("writeErrors") or [details.get("writeConcernError") or {}]
    return error.code if error.code is not None else written[0].get("code")


def _first(text: str) -> str:
    """Without the driver's own description of the servers and of its settings."""
    short = text.split(", Timeout:")[0].split(" (config")[0].split(", full error:")[0]
    return " ".join(short.split())


def _tls(reason: str) -> str:
    """What the reason may mean: a server does not say that it wants TLS, it hangs up."""
    if "SSL" in reason or "certificate" in reason.lower():
        return "; see tls, tlsCAFile and tlsCertificateKeyFile in the URL"
    hung_up = ("connection closed", "reset by peer")
    return "; if it asks for TLS, the URL needs tls=true" if _any(hung_up, reason) else ""


def _any(words: tuple[str, ...], text: str) -> bool:
    return any(word in text.lower() for word in words)
