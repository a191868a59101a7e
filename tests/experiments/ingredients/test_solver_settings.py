"""From the settings of an algorithm to the solvers of the library."""

from typing import Any

import pytest

from experiments.ingredients.algorithm import _linear
from experiments.ingredients.algorithm_table import AlgorithmSettings
from experiments.tracking import UserError
from l2l_implicit import CG, Direct, Identity, Jacobi, Kronecker, Neumann, Nystrom

LINEAR: list[tuple[dict[str, Any], Any]] = [
    ({"cg_steps": 7, "preconditioner": "kronecker"}, CG(7, preconditioner=Kronecker())),
    ({"preconditioner": "jacobi", "damping": 0.5}, CG(damping=0.5, preconditioner=Jacobi())),
    ({"preconditioner": "nystrom", "cg_tol": 1e-3}, CG(tol=1e-3, preconditioner=Nystrom())),
    ({"truncated": True}, CG(truncated=True)),
    ({"solver": "nystrom", "cg_steps": 5, "damping": 0.5}, Nystrom(5, 0.5)),
    ({"solver": "identity", "lr": 0.3}, Identity(0.3)),
    ({"solver": "neumann", "cg_steps": 9}, Neumann(9)),
    ({"solver": "direct", "damping": 0.5}, Direct(0.5)),
]


@pytest.mark.parametrize("settings, expected", LINEAR, ids=[str(s) for s, _ in LINEAR])
def test_the_linear_solver_is_the_one_that_is_set(settings: dict[str, Any], expected: Any) -> None:
    assert _linear(AlgorithmSettings.of(settings)) == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"solver": "direct", "truncated": True}, "solver: expected cg with a preconditioner"),
        ({"solver": "neumann", "preconditioner": "jacobi"}, "expected cg .* got 'neumann'"),
        ({"name": "imaml_gd", "preconditioner": "kronecker"}, "expected jacobi or nystrom"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _linear(AlgorithmSettings.of(settings))
    assert "\n" not in str(caught.value)
