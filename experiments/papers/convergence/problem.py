r"""A meta-learning problem with known constants, non-convex in theta.

.. math::
    g_i(\theta, \phi) &= \tfrac12 \phi^\top A_i \phi + c \sum_j \log\cosh \phi_j
                         - \phi^\top (B_i \sin(C_i \theta) + d_i), \\
    f_i(\phi) &= \tfrac{1}{\sqrt q} \sum_j \Big(\sqrt{1 + (\phi_j - y_{ij})^2} - 1\Big)

for tasks i of a finite set, whose mean is the population: theta is in R^p, phi in R^q.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from experiments.papers.convergence.theory import ProblemConstants

LARGEST_TANH_CURVATURE = 4.0 / (3.0 * math.sqrt(3.0))  # of (tanh x)'' over all x


class Exact(NamedTuple):
    """The population's outer objective, its hypergradient ``[p]``, and the solutions ``[M, q]``."""

    objective: float
    hypergradient: Tensor
    solutions: Tensor


class Tasks(NamedTuple):
    """M tasks.

    Attributes:
        a: ``[M, q, q]``, symmetric, eigenvalues from 1 to the largest curvature.
        b, c: ``[M, q, p]`` and ``[M, p, p]``.
        d, y: ``[M, q]``.
        bend: the coefficient c of the log-cosh term.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    y: Tensor
    bend: float

    def inner(self, phi: Tensor, pull: Tensor) -> Tensor:
        """The sum of all g_i at ``phi [M, q]``; ``pull`` is `pull` of theta."""
        linear = 0.5 * torch.bmm(self.a, phi.unsqueeze(2)).squeeze(2) - pull
        # log cosh x = softplus(2 x) - x - log 2
        bent = softplus(2.0 * phi) - phi
        return (phi * linear + self.bend * bent).sum()

    def outer(self, phi: Tensor) -> Tensor:
        """The mean of all f_i."""
        distances = torch.sqrt(1.0 + (phi - self.y).square()) - 1.0
        return distances.sum() / math.sqrt(phi.shape[1]) / len(phi)

    def pull(self, theta: Tensor) -> Tensor:
        """Where theta draws phi, ``[M, q]``."""
        waves = torch.sin(torch.einsum("ijk,k->ij", self.c, theta))
        return torch.einsum("ijk,ik->ij", self.b, waves) + self.d

    def solve(self, theta: Tensor) -> Tensor:
        """Every inner problem's solution ``[M, q]``, by Newton's method to rounding.

        Raises:
            ArithmeticError: it did not get there.
        """
        pull = self.pull(theta)
        phi = torch.linalg.solve(self.a, pull)
        for _ in range(50):
            gradient = torch.einsum("ijk,ik->ij", self.a, phi) + self.bend * phi.tanh() - pull
            if gradient.norm() <= 1e-13 * (1.0 + pull.norm()):
                return phi
            phi = phi - torch.linalg.solve(self.curvature(phi), gradient)
        raise ArithmeticError(
            f"inner solution: expected a gradient of 1e-13, got {gradient.norm():.1e} after 50 "
            "Newton steps; use a smaller bend"
        )

    def exact(self, theta: Tensor) -> Exact:
        """Eq. (4), with dense matrices."""
        phi = self.solve(theta)
        residual = phi - self.y
        slope = residual / torch.sqrt(1.0 + residual.square()) / math.sqrt(phi.shape[1])
        v = torch.linalg.solve(self.curvature(phi), slope)
        waves = torch.cos(torch.einsum("ijk,k->ij", self.c, theta))
        moved = torch.einsum("ijk,ij->ik", self.b, v) * waves
        hypergradient = torch.einsum("ijk,ij->k", self.c, moved) / len(phi)
        return Exact(float(self.outer(phi)), hypergradient, phi)

    def curvature(self, phi: Tensor) -> Tensor:
        """The Hessians of g_i in phi, ``[M, q, q]``."""
        return self.a + torch.diag_embed(self.bend / torch.cosh(phi).square())

    def subset(self, chosen: Tensor) -> Tasks:
        """Those of some indices, which may repeat."""
        tensors = (tensor[chosen] for tensor in self[:5])
        return Tasks(*tensors, self.bend)

    def constants(self) -> ProblemConstants:
        """Of Assumptions 1 to 3, for all theta and phi."""
        eigenvalues = torch.linalg.eigvalsh(self.a)
        b, c = (torch.linalg.matrix_norm(m, 2).amax() for m in (self.b, self.c))
        rows = self.c.norm(dim=2).amax()
        largest, q = float(eigenvalues.max()) + self.bend, self.y.shape[1]
        spread = torch.linalg.matrix_norm(self.a - self.a.mean(0), 2).square().mean().sqrt()
        return ProblemConstants(
            mu=float(eigenvalues.min()),
            l_g=math.hypot(largest, float(b * c)),
            l_f=1.0 / math.sqrt(q),
            l_f0=1.0,
            l_g1=float(b * c * rows),
            l_g2=LARGEST_TANH_CURVATURE * self.bend,
            sigma_f1=1.0,
            sigma_g1=float(spread),
        )


def make_tasks(
    number: int, p: int, q: int, condition: float, bend: float, strength: float, spread: float,
    seed: int,
) -> Tasks:  # fmt: skip
    """Random tasks whose targets are solutions for a theta of their own, around a common one.

    Args:
        number: M.
        p, q: dimensions of theta and phi, p <= q.
        condition: largest over smallest eigenvalue of every ``a``.
        bend: of the log-cosh term.
        strength: spectral norm of every ``b``, by which theta acts.
        spread: of the tasks, relative to what they share; 0: they differ in ``a`` and ``d`` alone.
        seed: of everything.
    """
    draw = _Draw(seed)
    rotation, _ = torch.linalg.qr(draw(number, q, q))
    eigenvalues = torch.logspace(0, math.log10(condition), q, dtype=torch.float64)
    a = rotation @ torch.diag(eigenvalues) @ rotation.mT
    b = strength * _unit(_orthonormal(draw(1, q, p)) + 0.1 * spread * draw(number, q, p))
    c = _unit(_orthonormal(draw(1, p, p)) + 0.1 * spread * draw(number, p, p))
    tasks = Tasks(0.5 * (a + a.mT), b, c, 0.5 * draw(number, q), torch.zeros(number, q), bend)
    center = 0.5 * draw(p)
    own = [tasks.subset(torch.tensor([i])) for i in range(number)]
    y = [task.solve(center + 0.5 * spread * draw(p))[0] for task in own]
    return tasks._replace(y=torch.stack(y))


def _orthonormal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix)[0]


def _unit(matrices: Tensor) -> Tensor:
    """Of spectral norm 1."""
    return matrices / torch.linalg.matrix_norm(matrices, 2)[:, None, None]


class _Draw:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)
