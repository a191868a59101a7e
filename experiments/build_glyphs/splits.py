"""The two fixed splits of the classes into train, validation and test."""

import unicodedata

import numpy as np

SCRIPTS = ("LATIN", "GREEK", "CYRILLIC", "HEBREW", "ARMENIAN", "GEORGIAN", "THAI", "DEVANAGARI")
SCRIPT_MODES = {"train": ("LATIN",), "validation": ("GREEK", "HEBREW"), "test": ("CYRILLIC",)}
SEED = 0


def script_of(point: int) -> str:
    """The script a character belongs to by its Unicode name; SYMBOL for what is no letter."""
    first = unicodedata.name(chr(point)).split()[0]
    if first in SCRIPTS:
        return first
    if first == "COPTIC":  # the Coptic letters of the Greek block
        return "GREEK"
    if not unicodedata.category(chr(point)).startswith("L"):
        return "SYMBOL"
    return "LATIN" if point < 0x370 else "OTHER"


def random_split(classes: int) -> dict[str, list[int]]:
    """64 / 16 / 20 per cent of the classes, drawn once; sorted class indices by mode."""
    order = np.random.RandomState(SEED).permutation(classes)
    first, second = int(0.64 * classes), int(0.80 * classes)
    parts = np.split(order, [first, second])
    return {mode: sorted(part.tolist()) for mode, part in zip(SCRIPT_MODES, parts, strict=True)}


def script_split(scripts: list[str]) -> dict[str, list[int]]:
    """Train on Latin, validate on Greek and Hebrew, test on Cyrillic (other scripts unused)."""
    return {
        mode: [index for index, script in enumerate(scripts) if script in names]
        for mode, names in SCRIPT_MODES.items()
    }
