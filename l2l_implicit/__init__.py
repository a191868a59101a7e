"""Implicit meta-learning for learn2learn: the hypergradient without the inner loop's history."""

from l2l_implicit import _compat  # noqa: F401, I001  (first: it makes learn2learn importable)
from l2l_implicit import tasks  # noqa: F401  (offers our task sets to learn2learn's list)
from l2l_implicit.chunked import Chunked
from l2l_implicit.diagnostics import Diagnostics, UnsolvedWarning
from l2l_implicit.gbml import ImplicitGBML
from l2l_implicit.imaml import ImplicitMAML
from l2l_implicit.inner_problem.gauss_newton import GaussNewton, Hessian
from l2l_implicit.inner_problem.linearization import Linearization
from l2l_implicit.inner_solvers.gradient_descent import GradientDescent
from l2l_implicit.inner_solvers.lbfgs import LBFGS
from l2l_implicit.inner_solvers.newton import Newton
from l2l_implicit.inner_solvers.protocol import InnerSolver, InnerStep
from l2l_implicit.learner import ImplicitCGHead
from l2l_implicit.linear_solvers.conjugate_gradient import CG
from l2l_implicit.linear_solvers.direct import Direct
from l2l_implicit.linear_solvers.identity import Identity
from l2l_implicit.linear_solvers.neumann import Neumann
from l2l_implicit.linear_solvers.nystrom import Nystrom
from l2l_implicit.linear_solvers.preconditioners import Jacobi, Kronecker, Preconditioner
from l2l_implicit.linear_solvers.solution import LinearSolution, LinearSolver
from l2l_implicit.perturbed import Perturbed

__version__ = "0.2.0"

__all__ = [
    "CG", "Chunked", "Diagnostics", "Direct", "GaussNewton", "GradientDescent", "Hessian",
    "Identity", "ImplicitCGHead", "ImplicitGBML", "ImplicitMAML", "InnerSolver", "InnerStep",
    "Jacobi", "Kronecker", "LBFGS", "LinearSolution", "LinearSolver", "Linearization", "Neumann",
    "Newton", "Nystrom", "Perturbed", "Preconditioner", "UnsolvedWarning",
]  # fmt: skip
