"""From the strings of the command line and of recorded runs to the library's solvers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from l2l_implicit import (
    CG,
    LBFGS,
    Direct,
    GradientDescent,
    InnerSolver,
    LinearSolver,
    Neumann,
    Newton,
    checks,
)

Settings = Mapping[str, Any]

ANY_STEP_SIZE = 0.1  # for a learner whose inner solver has a step size of its own

# Newton and L-BFGS go on until their error is small beside the linear solver's.
_INNER: dict[str, Callable[[Settings], InnerSolver]] = {
    "newton": lambda s: Newton(cg_steps=s["cg_steps"], tol=0.1 * s["cg_tol"]),
    "lbfgs": lambda s: LBFGS(tol=0.1 * s["cg_tol"]),
    "gradient": lambda s: GradientDescent(adaptive=s["lr"] == "auto"),
}
_LINEAR: dict[str, Callable[[Settings], LinearSolver]] = {
    "cg": lambda s: CG(steps=s["cg_steps"], tol=s["cg_tol"], damping=s["damping"]),
    "neumann": lambda s: Neumann(steps=s["cg_steps"], tol=s["cg_tol"], damping=s["damping"]),
    "direct": lambda s: Direct(damping=s["damping"]),
}
_DEFAULTS: Settings = {
    "lr": ANY_STEP_SIZE, "solver": "cg", "cg_steps": 20, "cg_tol": 1e-4, "damping": 0.0,
}  # fmt: skip


def solvers(**settings: Any) -> dict[str, Any]:
    """``inner`` and ``linear`` of `ImplicitCGHead`.

    Args:
        settings: ``step`` (newton, lbfgs or gradient) and, if they are not the defaults, ``lr`` (a
            number, or auto for gradient steps of 1 over the largest curvature), ``solver`` (cg,
            neumann or direct), ``cg_steps``, ``cg_tol`` and ``damping``.

    Raises:
        ValueError, TypeError: for one that there is not, in one line.

    Example:
        >>> from experiments.ingredients.solvers import solvers
        >>> found = solvers(step="newton", cg_steps=5)
        >>> found["inner"], found["linear"]
        (Newton(cg_steps=5, tol=1e-05), CG(steps=5, tol=0.0001, damping=0.0))
    """
    s = {**_DEFAULTS, **settings}
    checks.choice("step", s["step"], _INNER)
    checks.choice("solver", s["solver"], _LINEAR)
    checks.count("cg_steps (N)", s["cg_steps"])
    checks.positive("cg_tol", s["cg_tol"])
    checks.not_negative("damping", s["damping"])
    return {"inner": _INNER[s["step"]](s), "linear": _LINEAR[s["solver"]](s)}


def step_size(lr: Any) -> Any:
    """The learner's ``lr``, which is a number whatever the inner solver takes its steps by."""
    return ANY_STEP_SIZE if lr == "auto" else lr
