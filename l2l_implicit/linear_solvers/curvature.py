"""How strongly functions are curved at most: the numbers that safe step sizes come from."""

import torch
from torch import Tensor

from l2l_implicit.linear_solvers.solution import Matvec, dot


def largest_curvature(
    matvec: Matvec, like: Tensor, max_steps: int = 10, tol: float = 0.01
) -> Tensor:
    r"""Estimates of :math:`\max_i |\lambda_i|` of T symmetric matrices, by Lanczos' method.

    The largest Ritz value in modulus plus its residual, which bounds the distance to an
    eigenvalue: Ritz values alone come from below, and a step of 1 over too little diverges.

    Args:
        matvec, like: the products with vectors ``[T, n]``, and a tensor as these are.
        max_steps: the most products.
        tol: relative residual at which fewer are enough.

    Returns:
        The estimates, ``[T]``; 0 for a zero matrix, infinity for products that are not finite.

    References:
        Golub, Van Loan, Matrix Computations, section 10.1.
    """
    # Vectors that lie in no subspace on purpose, the same at every call.
    generator = torch.Generator("cpu").manual_seed(0)
    q = torch.randn(like.shape[1], generator=generator, device="cpu").to(like).expand_as(like)
    q = q / torch.linalg.vector_norm(q, dim=1, keepdim=True)
    tasks, steps = len(like), min(max_steps, like.shape[1])
    t = torch.zeros(tasks, steps, steps, dtype=torch.float64, device="cpu")
    basis, broken = [q], torch.zeros(tasks, dtype=torch.bool, device=like.device)
    done, found = broken, torch.zeros_like(q[:, 0])
    for k in range(steps):
        product = matvec(q)
        broken = broken | ~product.sum(1).isfinite()
        product = torch.where(broken.unsqueeze(1), 0.0, product)  # no other task's business
        t[:, k, k] = dot(q, product)
        for before in basis + basis:  # twice is enough
            product = product - dot(before, product).unsqueeze(1) * before
        norm = torch.linalg.vector_norm(product, dim=1)
        broken = broken | ~(norm.isfinite() & t[:, k, k].isfinite().to(norm.device))
        norm = torch.where(broken, 0.0, norm)
        t[broken.cpu()] = 0.0
        values, vectors = torch.linalg.eigh(t[:, : k + 1, : k + 1])
        i = values.abs().argmax(1, keepdim=True)
        ritz, last = (x.gather(1, i).squeeze(1).abs().to(norm) for x in (values, vectors[:, -1]))
        largest = ritz + norm * last
        found = torch.where(done, found, largest)  # each ends as it would alone
        done = done | (norm * last <= max(tol, torch.finfo(q.dtype).eps) * largest)
        if bool(done.all()) or k == steps - 1:
            break
        q = product / norm.clamp_min(torch.finfo(q.dtype).tiny).unsqueeze(1)
        q = torch.where(broken.unsqueeze(1), 0.0, q)
        basis.append(q)
        t[:, k, k + 1] = t[:, k + 1, k] = norm
    return torch.where(broken, torch.inf, found)
