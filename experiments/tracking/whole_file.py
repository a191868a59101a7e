"""A file that is there as a whole, or as it was."""

import errno
import hashlib
import os
import secrets
import stat
from pathlib import Path

from experiments.tracking.errors import UserError


def write_whole(path: Path, content: bytes | memoryview, draft: Path | None = None) -> None:
    """The whole new file or the whole old one, whoever is killed and whenever power fails.

    The mode stays; a link is replaced and not followed. UserError: what is there is no regular
    file. OSError: it cannot be written; the old file is whole.
    """
    old = path.stat() if path.exists() else None
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise UserError(f"expected the name of a file to write, got {path}; move that away")
    draft = draft or path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")  # nobody else's
    file = open(draft, "xb")
    try:
        with file:
            if old is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with open(draft, "rb") as written:  # in pieces: a copy of the whole is memory
            found = hashlib.file_digest(written, "sha256").digest()
        if found != hashlib.sha256(content).digest():
            raise OSError(errno.EIO, "other bytes than were written")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
