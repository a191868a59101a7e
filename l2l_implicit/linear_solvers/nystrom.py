"""The matrix by a random sketch of low rank: a linear solver, and a preconditioner."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.linear_solvers import solution
from l2l_implicit.linear_solvers.solution import LinearSolution, Matvec, System, applied_once


@dataclass(frozen=True)
class Nystrom:
    r"""The Nystrom approximation :math:`A \approx U \Lambda U^\top + \mu I`, and its inverse.

    :math:`U \Lambda U^\top` of rank r is made of r products with random vectors; :math:`\mu`, l2
    plus the damping, is known and need not be approximated. The inverse is Woodbury's,

    .. math:: v = \frac1\mu \bigl( b - U \Lambda (\Lambda + \mu I)^{-1} U^\top b \bigr) .

    It is exact where the loss's Hessian has no more than r eigenvalues above 0. A linear solver
    applies it once, whatever is left, and says how much that is; as a preconditioner of `CG` it
    makes the first steps. Memory: r vectors. Directions of negative curvature are left out of
    the approximation, and said (`NOT_POSITIVE`).

    Args:
        rank: r; at most the number of unknowns is taken.
        damping: added to the diagonal of the system in the backward pass.
        seed: of the random vectors, which are the same at each call and for each task; torch's own
            generator is left alone.

    References:
        Hataya, Yamada (2023), Nystrom Method for Accurate and Scalable Implicit Differentiation;
        Frangella, Tropp, Udell (2023), Randomized Nystrom Preconditioning.

    Example:
        >>> import torch
        >>> from l2l_implicit import Nystrom
        >>> A = torch.diag(torch.tensor([5.0, 3.0, 0.0, 0.0]))
        >>> answer = Nystrom(2, damping=1.0).solve(lambda p: p @ A + p, torch.ones(1, 4))
        >>> answer.solution.round(decimals=4), answer.steps
        (tensor([[0.1667, 0.2500, 1.0000, 1.0000]]), tensor([3]))
    """

    rank: int = 20
    damping: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks.count("Nystrom: rank", self.rank)
        checks.not_negative("Nystrom: damping", self.damping)

    def solve(self, hvp: Matvec, b: Tensor, start: Tensor | None = None) -> LinearSolution:
        """The inverse's products with ``b``, ``[T, n]``, and their true residuals.

        Raises:
            ValueError: where l2 and damping are both 0: a matrix of low rank has no inverse.
        """
        system = System.of(hvp)
        shift = system.shift or self.damping
        if shift == 0.0:
            raise ValueError(
                "linear=Nystrom(): expected l2 or damping above 0, without which a matrix of low "
                "rank has no inverse, got 0; set one, or use linear=CG(preconditioner=Nystrom())"
            )
        rows, values, indefinite = self._sketch(system, b, shift)
        share = values / (values + shift)
        told = {solution.NOT_POSITIVE: indefinite}
        answer = applied_once(system, b, lambda v: (v - _along(rows, share, v)) / shift, told)
        return replace(answer, steps=answer.steps + rows.shape[1])

    def inverse(self, hvp: Matvec, like: Tensor) -> Matvec:
        r"""As a preconditioner: beyond the sketch's span the matrix counts as its smallest value.

        Without l2 and damping :math:`\mu` is 0, and the sketch is of the whole matrix.
        """
        system = System.of(hvp)
        rows, values, _ = self._sketch(system, like, system.shift)
        values = values + system.shift
        kept = torch.where(values > 0, values, math.inf).amin(1, keepdim=True)
        gain = torch.where(values > 0, kept / values, 1.0)
        return lambda vector: vector - _along(rows, 1.0 - gain, vector)

    def _sketch(self, system: System, like: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor]:
        r"""U as rows ``[T, r, n]``, :math:`\Lambda` ``[T, r]``, and whether negative curvature was
        met, ``[T]``; nothing of a task whose products are not finite."""
        n, eps = like.shape[1], torch.finfo(like.dtype).eps
        generator = torch.Generator("cpu").manual_seed(self.seed)
        shape = n, min(self.rank, n)
        test = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        test = torch.linalg.qr(test)[0].mT.to(like)  # [r, n]
        images = [system(row.expand_as(like)).sub(row, alpha=shift) for row in test]
        image = torch.stack(images, 1) if images else like.new_zeros(len(like), 0, n)
        lost = ~image.sum((1, 2)).isfinite()
        image = torch.where(lost.view(-1, 1, 1), 0.0, image)
        image = image.to(torch.promote_types(like.dtype, torch.float32))  # torch factors no halves
        core = torch.matmul(image, test.mT.to(image))
        values, basis = torch.linalg.eigh(0.5 * (core + core.mT))
        # Below rounding, and where it is negative, the sketch says nothing.
        floor = 10.0 * eps * shape[1] * (values.abs().amax(1, keepdim=True) + shift)
        kept = values > floor
        scale = torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0.0)
        root = torch.bmm(basis.mT, image) * scale.unsqueeze(2)
        _, singular, rows = torch.linalg.svd(root, full_matrices=False)
        return rows.to(like), singular.square().to(like), (values < -floor).any(1)


def _along(rows: Tensor, factors: Tensor, vector: Tensor) -> Tensor:
    """``rows' (factors * (rows vector))``, shapes ``[T, r, n], [T, r], [T, n] -> [T, n]``."""
    inner = torch.bmm(rows, vector.unsqueeze(2)).squeeze(2) * factors
    return torch.bmm(rows.mT, inner.unsqueeze(2)).squeeze(2)
