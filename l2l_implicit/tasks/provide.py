"""Data sets on disk: what is in place is used, what is missing is fetched by its owner's code."""

import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from l2l_implicit.checks import printable


class Needed(NamedTuple):
    """A file or folder that a data set reads; paths are from the root."""

    path: str  # of the file or folder
    url: str  # public address of the file, or of the archive that holds it
    archive: str | None = None  # where the archive is looked for; None: no archive
    into: str = "."  # folder into which the archive is unpacked


def provide(
    name: str, root: Path, needed: Sequence[Needed], download: Callable[[], Any],
    leaves: Sequence[str] = (),
) -> None:  # fmt: skip
    """Unpack or download what is not in place of all that the data set ``name`` needs.

    Args:
        download: fetches it with the code of the library that owns it.
        leaves: what an interrupted download leaves, from the root.

    Raises:
        FileNotFoundError: it cannot be downloaded; says which file from where belongs where.
        ValueError: an archive is damaged.
    """
    for item in missing(root, needed):
        if item.archive is not None and (root / item.archive).is_file():
            unpack(root / item.archive, root / item.into, item.url)
    if not missing(root, needed):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with removed_if_interrupted([root / path for path in leaves]):
            download()
            if absent := missing(root, needed):
                raise FileNotFoundError(f"no {absent[0].path} after the download")
    except Exception as error:  # whatever the owner's code raises
        raise FileNotFoundError(
            f"expected the data of {name} in {root}, found none and could not download it "
            f"({type(error).__name__}): {remedy(root, missing(root, needed))}"
        ) from error


def unpack(archive: Path, folder: Path, url: str) -> None:
    """Unpack a zip; its entries appear in the folder only once all of it is unpacked."""
    draft = folder / f".unpacking-{os.getpid()}"
    try:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(draft)  # writes nothing outside of draft, whatever the names say
        for entry in draft.iterdir():
            place = folder / entry.name
            try:
                if not place.exists():
                    os.replace(entry, place)
            except OSError:  # not where another process was quicker with the same
                if not place.exists():
                    raise
    except OSError:
        raise
    except Exception as error:  # what damage anywhere in it makes zipfile raise
        raise ValueError(
            f"expected a zip archive in {archive}, got {error}: delete it and get it from {url}"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def removed_if_interrupted(paths: Iterable[Path]) -> Iterator[None]:
    """Remove those paths that were not there before where the block ends with an error.

    Half a download would be taken for the whole at the next start.
    """
    new = [path for path in paths if not path.exists()]
    try:
        yield
    except BaseException:
        for path in new:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


@contextmanager
def damage_explained(name: str, root: Path, needed: Sequence[Needed]) -> Iterator[None]:
    """Raises ValueError, saying what to replace, where reading files that are there fails."""
    try:
        for item in needed:
            place = root / item.path
            if place.exists() and not (place.is_file() or place.is_dir()):  # reading would wait
                raise ValueError(f"{item.path} is no regular file")
        yield
    except Exception as error:  # on damaged files the loaders raise anything
        places = ", ".join(str(root / item.path) for item in needed)
        reason = printable(f"{type(error).__name__}: {' '.join(str(error).split())}"[:200])
        raise ValueError(
            f"expected the data of {name} in {places}, could not read it ({reason}): delete it, "
            f"and {remedy(root, needed)}"
        ) from error


def missing(root: Path, needed: Sequence[Needed]) -> list[Needed]:
    """Those of the files that are not in place."""
    return [item for item in needed if not (root / item.path).exists()]


def remedy(root: Path, needed: Sequence[Needed]) -> str:
    """Which files from where belong into which folder; archives are unpacked by `provide`."""
    groups: dict[tuple[str, Path], dict[str, None]] = {}
    for item in needed:
        source, _, name = item.url.rpartition("/")
        place = root / (item.archive or item.path)
        entry = name if name == place.name else f"{name} (as {place.name})"
        groups.setdefault((source, place.parent), {})[entry] = None
    return "; ".join(
        f"get {', '.join(names)} from {source} into {folder}"
        for (source, folder), names in groups.items()
    )
