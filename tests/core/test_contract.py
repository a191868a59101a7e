"""learn2learn's contract, asked of the implicit learners."""

from collections.abc import Callable
from typing import Any

import pytest
from contract import *  # noqa: F403
from small_task import FLOAT64, UNSOLVED_OR_NOT

from l2l_implicit import ImplicitCGHead, ImplicitMAML, Newton

pytestmark = [FLOAT64, UNSOLVED_OR_NOT]
LEARNERS: dict[str, Callable[..., Any]] = {
    "ImplicitCGHead": lambda *args, **kw: ImplicitCGHead(*args, **{"anchor": "init", **kw}),
    "ImplicitMAML": lambda *args, **kw: ImplicitMAML(*args, **{"inner": Newton(), **kw}),
    "implicit, first order": lambda *args, **kw: ImplicitCGHead(
        *args, **{"first_order": True, **kw}),
}  # fmt: skip


@pytest.fixture(params=LEARNERS.values(), ids=LEARNERS.keys())
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.param
