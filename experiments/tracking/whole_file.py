"""A file that is there as a whole, or as it was."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from experiments.tracking.errors import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """What is written within takes the file's place at the end; after an error the old one stays.

    A link is replaced and not followed. UserError: what is there is no regular file.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"expected the name of a file to write, got {path}; move that away")
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")  # nobody else's
    raw = open(draft, "xb")
    try:
        with raw:
            yield raw
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
