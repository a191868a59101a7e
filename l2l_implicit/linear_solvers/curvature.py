"""How strongly a function is curved at most: the number that a safe step size comes from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from l2l_implicit.linear_solvers.solution import Matvec


def largest_curvature(
    matvec: Matvec, like: Tensor, max_steps: int = 10, tol: float = 0.01
) -> float:
    r"""An estimate of :math:`\max_i |\lambda_i|` of a symmetric matrix, by Lanczos' method.

    The largest Ritz value in modulus plus its residual, which bounds the distance to an
    eigenvalue: Ritz values alone come from below, and a step of 1 over too little diverges.

    Args:
        matvec: maps a vector of shape ``[n]`` to its product with the matrix.
        like: a tensor of shape, dtype and device of such a vector.
        max_steps: the most products.
        tol: relative residual at which fewer are enough.

    Returns:
        The estimate; 0 for the zero matrix, nan or infinity for products that are not finite.

    References:
        Golub, Van Loan, Matrix Computations, section 10.1.

    Example:
        >>> import torch
        >>> from l2l_implicit.linear_solvers.curvature import largest_curvature
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0]))
        >>> round(largest_curvature(A.mv, torch.ones(3)), 3)
        5.0
    """
    # A vector that lies in no subspace on purpose, the same at every call.
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(like.numel(), generator=generator).to(like)
    q /= q.norm()
    basis, diagonal = [q], list[float]()
    off_diagonal = list[float]()
    largest = 0.0
    for _ in range(min(max_steps, like.numel())):
        product = matvec(q)
        diagonal.append(float(q.dot(product)))
        for before in basis + basis:  # twice is enough
            product = product - before.dot(product) * before
        norm = float(product.norm())
        if not math.isfinite(norm):
            return norm
        ritz, last = _largest_ritz(diagonal, off_diagonal)
        largest = abs(ritz) + norm * last
        if norm * last <= tol * abs(ritz) or norm <= torch.finfo(q.dtype).eps * abs(ritz):
            break
        q = product / norm
        basis.append(q)
        off_diagonal.append(norm)
    return largest


def _largest_ritz(diagonal: list[float], off_diagonal: list[float]) -> tuple[float, float]:
    """The eigenvalue largest in modulus, and the last entry of its eigenvector in modulus."""
    t = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, value in enumerate(off_diagonal):
        t[i, i + 1] = t[i + 1, i] = value
    values, vectors = torch.linalg.eigh(t)
    i = int(values.abs().argmax())
    return float(values[i]), float(vectors[-1, i].abs())
