"""Conjugate gradient, the default solver of the linear system."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.linear_solvers import solution
from l2l_implicit.linear_solvers.preconditioners import Preconditioner
from l2l_implicit.linear_solvers.solution import LinearSolution, Matvec, RightHandSides, System, dot


@dataclass(frozen=True)
class CG:
    r"""Conjugate gradient: solves :math:`A v = b` for positive definite A, given by its products.

    What differs from the reference: the step size is that of the AAAI text (the extended version
    misprints it); a task stops at a relative tolerance; a start that is worse than none is dropped;
    and a task stops, saying so, where :math:`p^\top A p \le 0` or a value is not finite, before
    either reaches the answer. The last iterate is the best one: each step lowers the error in the
    norm of A, while the residual may rise, even above that of zero.

    Args:
        steps: the largest number N of steps.
        tol: stop once ``norm(b - A v) <= tol * norm(b)``, with a preconditioner too; a learner's
            ``accuracy`` takes its place.
        damping: added to the diagonal of the system in the backward pass.
        preconditioner: `Jacobi`, `Kronecker`, `Nystrom`, or one of your own, a `Preconditioner`;
            products that it costs are counted in the solution's steps, beyond N.
        truncated: end where ``norm(v)`` would exceed ``norm(b)`` over l2 plus damping, on that
            sphere. No convex loss's solution is as long, so there it changes nothing; where the
            loss is not convex the answer is no solution, but no noise either.

    References:
        Yang et al. (2025), Subroutine 1; Steihaug (1983), The conjugate gradient method and trust
        regions in large scale optimization (truncated).

    Example:
        >>> import torch
        >>> from l2l_implicit import CG
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> answer = CG().solve(lambda p: p @ A, torch.tensor([[1.0, 2.0]]))
        >>> answer.solution, answer.steps, answer.reason
        (tensor([[0.0909, 0.6364]]), tensor([2]), ['converged'])
    """

    steps: int = 20
    tol: float = 1e-4
    damping: float = 0.0
    preconditioner: Preconditioner | None = None
    truncated: bool = False
    takes_factor = True

    def __post_init__(self) -> None:
        checks.count("CG: steps (N)", self.steps)
        checks.positive("CG: tol", self.tol)
        checks.not_negative("CG: damping", self.damping)
        if self.preconditioner is not None:
            examples = "Jacobi(), Kronecker() or Nystrom()"
            checks.has_method(
                "CG: preconditioner", examples, "inverse(hvp, like)", self.preconditioner
            )

    def solve(self, hvp: Matvec, b: Tensor, start: Tensor | None = None) -> LinearSolution:
        """The last iterates, shape ``[T, n]``, for right-hand sides ``b`` of that shape."""
        system, inverse, reach = System.of(hvp), None, None
        if self.truncated:
            if (shift := system.shift or self.damping) == 0.0:
                raise ValueError(
                    "linear=CG(truncated=True): expected l2 or damping above 0, by which the "
                    "solution's length is bounded, got 0; set one"
                )
            reach = 1.0 / shift
        before = system.calls
        if self.preconditioner is not None:
            inverse = self.preconditioner.inverse(system, b)
        spent = system.calls - before
        answer = conjugate_gradient(system, b, self.steps, self.tol, start, inverse, reach)
        return replace(answer, steps=answer.steps + spent) if spent else answer


def conjugate_gradient(
    matvec: Matvec, b: Tensor, steps: int, tol: float, start: Tensor | None = None,
    inverse: Matvec | None = None, reach: float | None = None,
) -> LinearSolution:  # fmt: skip
    """Subroutine 1 for T systems; see `CG`. All scalars are ``[T]``; p is the direction, h = A p.

    With the ``inverse`` of a preconditioner M the directions are made of z = M^-1 r instead of r;
    with a ``reach`` v stays no longer than that times b.

    Works in place: memory is three vectors and a product, whatever happens; z is one more.

    References:
        Golub, Van Loan, Matrix Computations, Algorithm 11.5.1 (preconditioned).
    """
    system, plain = System.of(matvec), inverse is None
    right = RightHandSides(b)
    b_norm, lost, zero, (v, r) = right.norm, right.lost, right.zero, right.begin(system, start)
    rr = dot(r, r)
    z = r if inverse is None else inverse(r)
    p, rz = z.clone(), rr if plain else dot(r, z)
    pp = rr if plain else dot(p, p)
    largest, taken = torch.zeros_like(rr), torch.zeros_like(rr, dtype=torch.long)
    active, unknown, indefinite = ~(lost | zero), torch.zeros_like(zero), torch.zeros_like(zero)
    threshold, short = system.enough(tol, b_norm, v), torch.zeros_like(zero)
    for _ in range(steps):
        active = active & ~(rr.sqrt() <= threshold)
        if not bool(active.any()):
            break
        h = system(p)
        curvature, square = dot(p, h), torch.where(active, pp, 1.0)
        finite = curvature.isfinite() & rz.isfinite()
        largest = torch.maximum(largest, torch.where(finite, curvature / square, 0.0))
        rounding = 4.0 * torch.finfo(h.dtype).eps * largest * square
        unknown |= active & ~finite
        negative = active & finite & ((curvature <= rounding) | (rz <= 0.0))
        if reach is None:
            indefinite |= negative
        active = active & ~(unknown | indefinite)
        if not bool(active.all()):
            h = torch.where(active.unsqueeze(1), h, 0.0)  # it may not be finite
        eta = torch.where(active, rz / torch.where(active, curvature, 1.0), 0.0)
        if reach is not None:
            most = _to_sphere(v, p, square, reach * b_norm)
            short |= active & (negative | (eta > most))
            eta = torch.where(short & active, most, eta)
        v.addcmul_(eta.unsqueeze(1), p)
        r.addcmul_(eta.unsqueeze(1), h, value=-1.0)
        taken += active
        active = active & ~short
        rr = torch.where(active | short, dot(r, r), rr)
        lost = lost | ~rr.isfinite()  # nothing of it can be trusted
        active = active & ~lost
        z, before = r if inverse is None else inverse(r), rz
        rz = rr if plain else torch.where(active, dot(r, z), rz)
        zeta = torch.where(active, rz / torch.where(active, before, 1.0), 0.0)
        torch.addcmul(z, zeta.unsqueeze(1), p, out=p)
        # |p|^2 by its own recursion where r and the last p are orthogonal.
        pp = rr + zeta * zeta * pp if plain else dot(p, p)
        threshold = system.enough(tol, b_norm, v)
    left = rr.sqrt()
    reasons = {
        solution.NON_FINITE: unknown, solution.NOT_POSITIVE: indefinite, solution.TRUNCATED: short,
        solution.CONVERGED: left <= threshold,
    }  # fmt: skip
    return right.answer(v, taken, left, lost, reasons)


def _to_sphere(v: Tensor, p: Tensor, pp: Tensor, radius: Tensor) -> Tensor:
    """How far along ``p`` the sphere of this radius is from ``v`` inside it, ``[T]``."""
    along, left = dot(v, p), (radius.square() - dot(v, v)).clamp_min_(0.0)
    return (torch.sqrt(along.square() + pp * left) - along) / pp
