"""The matrix written out and factored: a linear solver for small systems."""

from dataclasses import dataclass

import torch
from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.linear_solvers import solution
from l2l_implicit.linear_solvers.solution import LinearSolution, Matvec, RightHandSides

LARGEST = 4096


@dataclass(frozen=True)
class Direct:
    r"""The dense matrices, by Cholesky, or LU where one is indefinite.

    The implicit function theorem asks for a regular :math:`A` only, so an indefinite one is solved
    too, and the reason says that phi is no minimum. For at most 4096 unknowns; a linear head that
    Newton has solved brings its own factor, whatever its size.

    Args:
        damping: added to the diagonal of the system in the backward pass.

    Example:
        >>> import torch
        >>> from l2l_implicit import Direct
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> Direct().solve(lambda p: p @ A, torch.tensor([[1.0, 2.0]])).solution
        tensor([[0.0909, 0.6364]])
    """

    damping: float = 0.0
    takes_factor = True

    def __post_init__(self) -> None:
        checks.not_negative("Direct: damping", self.damping)

    def solve(self, hvp: Matvec, b: Tensor, start: Tensor | None = None) -> LinearSolution:
        """The solutions, ``[T, n]``, with their true residuals; zero for a singular matrix.

        Raises:
            ValueError: for more than 4096 unknowns.
        """
        n = b.shape[1]
        if n > LARGEST:
            expected = f"linear=Direct(): expected at most {LARGEST} unknowns"
            raise ValueError(f"{expected}, got {n} parameters; use linear=CG()")
        right = RightHandSides(b)
        wide = torch.promote_types(b.dtype, torch.float32)  # torch factors no half precision
        unit = right.scaled.to(wide).unsqueeze(2)
        a, column = b.new_empty(len(b), n, n, dtype=wide), torch.zeros_like(b)
        for i in range(n):
            column[:, i] = 1.0
            a[:, i] = hvp(column)
            column[:, i] = 0.0
        a = (a + a.mT).mul_(0.5)  # the half of it that is rounding's asymmetry dropped
        sound = a.isfinite().all(2).all(1)
        a = torch.where(sound.view(-1, 1, 1), a, 0.0)
        factor, info = torch.linalg.cholesky_ex(a)
        v, indefinite = torch.cholesky_solve(unit, factor), info != 0
        if bool(indefinite.any()):
            by_lu, singular = torch.linalg.solve_ex(a, unit)
            usable = (singular == 0) & by_lu.isfinite().flatten(1).all(1)
            v[indefinite] = torch.where(usable.view(-1, 1, 1), by_lu, 0.0)[indefinite]
        left, steps = (unit - a @ v).norm(dim=(1, 2)), torch.full_like(info, n, dtype=torch.long)
        reasons = {solution.NOT_POSITIVE: indefinite, solution.CONVERGED: sound}
        return right.answer(v.squeeze(2), steps, left, ~sound, reasons)
