"""learn2learn's contract, asked of the implicit learners."""

from collections.abc import Callable
from typing import Any

import pytest
from contract import *  # noqa: F403

from l2l_implicit import ImplicitCGHead, ImplicitMAML, Newton

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning"),
]
LEARNERS: dict[str, Callable[..., Any]] = {
    "ImplicitCGHead": lambda *args, **kw: ImplicitCGHead(*args, **{"anchor": "init", **kw}),
    "ImplicitMAML": lambda *args, **kw: ImplicitMAML(*args, **{"inner": Newton(), **kw}),
    "implicit, first order": lambda *args, **kw: ImplicitCGHead(
        *args, **{"first_order": True, **kw}),
}  # fmt: skip


@pytest.fixture(params=LEARNERS.values(), ids=LEARNERS.keys())
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.param
