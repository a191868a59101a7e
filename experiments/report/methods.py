"""How each method is drawn: one colour everywhere, told apart without colour too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Look(NamedTuple):
    """A method's line.

    Attributes:
        color: from the colour-blind safe sets of Okabe and Ito, and of Tol.
        dashes: a matplotlib line style.
        family: what is adapted; each family has panels of its own, with this title.
    """

    color: str
    dashes: str
    marker: str
    family: str


HEAD, NETWORK, OTHER = "head adapted", "whole network adapted", ""

LOOKS = {
    "rm_metal": Look("#0072B2", "-", "o", HEAD),
    "rm_metal_paper": Look("#56B4E9", "--", "s", HEAD),
    "rm_metal_as_released": Look("#332288", ":", "^", HEAD),
    "itd_bio": Look("#D55E00", "-", "v", HEAD),
    "anil": Look("#E69F00", "-", "D", HEAD),
    "fo_anil": Look("#882255", "--", "P", HEAD),
    "imaml_gd": Look("#009E73", "-", "o", NETWORK),
    "imaml_hf": Look("#117733", "--", "s", NETWORK),
    "maml": Look("#CC79A7", "-", "v", NETWORK),
    "fomaml": Look("#000000", "--", "D", NETWORK),
    "reptile": Look("#999933", "-.", "P", NETWORK),
}
SPARE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#332288", "#999933",
         "#882255", "#000000")  # fmt: skip
STYLES, MARKERS = ("-", "--", ":", "-."), "osv^DPX<>*"


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for every name; names that are no known method get one in turn."""
    names = list(names)
    spare = [name for name in names if name not in LOOKS]
    made = {
        name: Look(
            SPARE[n % len(SPARE)], STYLES[n % len(STYLES)], MARKERS[n % len(MARKERS)], OTHER
        )
        for n, name in enumerate(spare)
    }
    return {name: LOOKS.get(name) or made[name] for name in names}
