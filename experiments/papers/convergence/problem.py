r"""A meta-learning problem with known constants, non-convex in theta, and Algorithm 1 on it.

.. math::
    g_i(\theta, \phi) &= \tfrac12 \phi^\top A_i \phi + c \sum_j \log\cosh \phi_j
                         - \phi^\top (B_i \sin(C_i \theta) + d_i), \\
    f_i(\phi) &= \tfrac{1}{\sqrt q} \sum_j \Big(\sqrt{1 + (\phi_j - y_{ij})^2} - 1\Big)

for tasks i of a finite set, whose mean is the population: theta is in R^p, phi in R^q.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from experiments.papers.convergence.theory import ProblemConstants
from l2l_implicit import CG, GradientDescent, ImplicitCGHead, LinearSolution, UnsolvedWarning

LEAST = 1e-100  # a squared norm that is zero has a logarithm too
LARGEST_TANH_CURVATURE = 4.0 / (3.0 * math.sqrt(3.0))  # of (tanh x)'' over all x


class Tasks(NamedTuple):
    """M tasks."""

    a: Tensor  # [M, q, q], symmetric, eigenvalues from 1 to the largest curvature
    b: Tensor  # [M, q, p]
    c: Tensor  # [M, p, p]
    d: Tensor  # [M, q]
    y: Tensor  # [M, q]
    bend: float  # the coefficient c of the log-cosh term

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

    def exact(self, theta: Tensor) -> Tensor:
        """The hypergradient ``[p]`` of eq. (4), with dense matrices."""
        phi = self.solve(theta)
        residual = phi - self.y
        slope = residual / torch.sqrt(1.0 + residual.square()) / math.sqrt(phi.shape[1])
        v = torch.linalg.solve(self.curvature(phi), slope)
        waves = torch.cos(torch.einsum("ijk,k->ij", self.c, theta))
        moved = torch.einsum("ijk,ij->ik", self.b, v) * waves
        return torch.einsum("ijk,ij->k", self.c, moved) / len(phi)

    def curvature(self, phi: Tensor) -> Tensor:
        """The Hessians of g_i in phi, ``[M, q, q]``."""
        return self.a + torch.diag_embed(self.bend / torch.cosh(phi).square())

    def subset(self, chosen: Tensor) -> Tasks:
        """Those of some indices, which may repeat."""
        return Tasks(*(tensor[chosen] for tensor in self[:5]), self.bend)

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
    """M random tasks whose targets are solutions for a theta of their own, around a common one.

    Args:
        p, q: dimensions of theta and phi, p <= q.
        condition: largest over smallest eigenvalue of every ``a``.
        strength: spectral norm of every ``b``, by which theta acts.
        spread: of the tasks, relative to what they share; 0: they differ in ``a`` and ``d`` alone.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rotation, _ = torch.linalg.qr(draw(number, q, q))
    eigenvalues = torch.logspace(0, math.log10(condition), q, dtype=torch.float64)
    a = rotation @ torch.diag(eigenvalues) @ rotation.mT
    b = strength * _unit(torch.linalg.qr(draw(1, q, p))[0] + 0.1 * spread * draw(number, q, p))
    c = _unit(torch.linalg.qr(draw(1, p, p))[0] + 0.1 * spread * draw(number, p, p))
    tasks = Tasks(0.5 * (a + a.mT), b, c, 0.5 * draw(number, q), torch.zeros(number, q), bend)
    center = 0.5 * draw(p)
    own = [tasks.subset(torch.tensor([i])) for i in range(number)]
    y = [task.solve(center + 0.5 * spread * draw(p))[0] for task in own]
    return tasks._replace(y=torch.stack(y))


def _unit(matrices: Tensor) -> Tensor:
    """Of spectral norm 1."""
    return matrices / torch.linalg.matrix_norm(matrices, 2)[:, None, None]


class Settings(NamedTuple):
    """K, N, both step sizes, and whether a slot of the batch starts where it was before."""

    inner_steps: int
    cg_steps: int
    inner_lr: float
    meta_lr: float
    warm: bool = True


class Slots(ImplicitCGHead):
    """Its Hessian is block diagonal: Subroutine 1 runs in every slot with steps of its own."""

    slots: tuple[int, int]

    def linear_solve(
        self, hvp: Callable[[Tensor], Tensor], b: Tensor, start: Tensor | None
    ) -> LinearSolution:
        shape = self.slots
        answer = self.linear.solve(
            lambda p: hvp(p.view(1, -1)).view(shape),
            b.view(shape),
            None if start is None else start.view(shape),
        )
        worst = int(answer.relative_residual.argmax())
        return LinearSolution(answer.solution.view(1, -1), answer.steps.amax(0, keepdim=True),
                              answer.relative_residual[worst].view(1), [answer.reason[worst]])


class Algorithm1:
    """Theta, ``[p]``, and the learner of its batch of so many slots, each with a phi, ``[q]``, zero
    at first."""

    def __init__(self, slots: int, q: int, settings: Settings, theta: Tensor) -> None:
        self.settings, self.theta = settings, theta.clone().requires_grad_()
        self._learner: Any = Slots(
            nn.ParameterList([torch.zeros(slots, q, dtype=torch.float64)]),
            settings.inner_lr,
            l2=0.0,
            warm_start=settings.warm,
            max_error=1e300,  # K_0 and N_0 are there to be undercut
            inner=GradientDescent(),
            linear=CG(settings.cg_steps, 1e-13),
        )
        self._learner.slots = slots, q

    def hypergradient(self, tasks: Tasks) -> Tensor:
        """Eq. (8) at the present theta, ``[p]``."""
        learner = self._learner.clone(task="slots" if self.settings.warm else None)
        pull = tasks.pull(self.theta)  # once a task: theta acts through nothing else
        phi = learner.module.parameters  # of all slots
        learner.adapt(lambda: tasks.inner(*phi(), pull), steps=self.settings.inner_steps)
        return torch.autograd.grad(tasks.outer(*phi()), self.theta)[0]

    def step(self, tasks: Tasks) -> None:
        """One outer iteration."""
        self.theta.data -= self.settings.meta_lr * self.hypergradient(tasks)


def trajectory(
    tasks: Tasks, settings: Settings, steps: int, batch: int | None, seed: int,
    tick: Callable[[int], object],
) -> list[float]:
    r""":math:`\|\nabla F(\theta_t)\|^2` for t = 0 to T - 1, exact, of Algorithm 1 from theta = 0.

    ``batch`` tasks are drawn with replacement at every iteration; None: all, as in Theorem 2.
    """
    number, p, q = len(tasks.y), tasks.c.shape[2], tasks.y.shape[1]
    generator = torch.Generator().manual_seed(seed)
    algorithm = Algorithm1(batch or number, q, settings, torch.zeros(p, dtype=torch.float64))
    norms = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsolvedWarning)  # too few steps is what is measured
        for _ in range(steps):
            norm = float(tasks.exact(algorithm.theta.detach()).square().sum())
            if not norms and norm <= LEAST:
                raise ArithmeticError(f"a squared hypergradient of {norm:g} at the start")
            norms.append(max(norm, LEAST))
            drawn = tasks
            if batch is not None:
                drawn = tasks.subset(torch.randint(number, (batch,), generator=generator))
            algorithm.step(drawn)
            tick(1)
    return norms
