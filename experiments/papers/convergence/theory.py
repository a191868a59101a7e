r"""How many inner and linear steps Algorithm 1 needs: K_0 and N_0 of Yang et al. (2025).

The theorems, and what differs from their printed text: docs/mathematics.md. The bounds are
sufficient, for warm starts from one outer iteration to the next. They ask only that errors shrink
to a fraction, not that they vanish.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import count

from l2l_implicit import checks


@dataclass(frozen=True)
class ProblemConstants:
    """What Assumptions 1 and 2 of Yang et al. (2025) say of a problem, in Euclidean norms.

    Attributes:
        mu: strong convexity of every inner objective g_i in phi; above 0.
        l_g: Lipschitz constant of every g_i's gradient; at least ``mu``. (Assumption 2 asks this
            of their mean alone, but the rate of conjugate gradient needs it of each.)
        l_f, l_f0: of the outer objective's gradient; of the outer objective itself, that is, a
            bound on its gradient.
        l_g1, l_g2: of g's mixed derivative and of its Hessian in phi.
        sigma_f1, sigma_g1: standard deviations over tasks of grad f_i and of g_i's Hessian; 0 for
            Theorem 2, whose l's hold for each task.

    Raises:
        ValueError, TypeError: for a number out of its range, in one line.

    Example:
        >>> ProblemConstants(mu=0.5, l_g=10.0, l_f=1.0, l_f0=1.0).kappa
        20.0
    """

    mu: float
    l_g: float
    l_f: float
    l_f0: float
    l_g1: float = 0.0
    l_g2: float = 0.0
    sigma_f1: float = 0.0
    sigma_g1: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            checks.not_negative(field.name, getattr(self, field.name))
        checks.positive("mu", self.mu)
        if self.l_g < self.mu:
            raise ValueError(
                f"l_g: expected at least mu = {self.mu:g}, got {self.l_g:g}; no curvature lies "
                "above the largest and below the smallest"
            )

    @property
    def kappa(self) -> float:
        r"""The condition number :math:`l_g / \mu` of the inner problem."""
        return self.l_g / self.mu


def inner_lr(constants: ProblemConstants) -> float:
    r"""The largest inner step size :math:`\lambda_\phi` with which (27) holds, from (23) to (27).

    Each g_i is :math:`l_g`-smooth, as in Assumption 3, and its own distance contracts:
    :math:`1 / l_g`. (The paper's way, by the mean of the tasks, gives :math:`\mu / (3 l_g^2)`.)

    Example:
        >>> inner_lr(ProblemConstants(mu=1.0, l_g=10.0, l_f=1.0, l_f0=1.0))
        0.1
    """
    return 1.0 / constants.l_g


def least_inner_steps(constants: ProblemConstants, lr: float | None = None) -> int:
    r"""K_0: the smallest K with :math:`2 (1 - \mu \lambda_\phi)^K < 1/3`, (71) and (72).

    ``lr`` is the inner step size; None: `inner_lr`. ValueError: it is above 1 / l_g, with which
    nothing is said of the inner loop.

    Example:
        >>> least_inner_steps(ProblemConstants(1.0, 10.0, 1.0, 1.0))
        18
    """
    lr = inner_lr(constants) if lr is None else lr
    checks.positive("lr", lr)
    if lr * constants.l_g > 1.0 + 1e-12:
        raise ValueError(
            f"lr: expected at most 1 / l_g = {1 / constants.l_g:.3g}, got {lr:g}; take inner_lr"
        )
    progress = constants.mu * lr
    return 1 if progress >= 1.0 else math.floor(math.log(6.0) / -math.log1p(-progress)) + 1


def least_linear_steps(constants: ProblemConstants, unknowns: int | None = None) -> int:
    r"""N_0: the smallest N with :math:`\Gamma_N` small enough for (70); also (69), Lemma 5.

    ``unknowns`` is phi's dimension, after as many steps conjugate gradient is exact; None: unknown.

    Example:
        >>> least_linear_steps(ProblemConstants(1.0, 10.0, 1.0, 1.0))
        8
    """
    c = constants
    if unknowns is not None:
        checks.count("unknowns", unknowns)
    # C_1 of (39): how far the linear system moves with theta and phi, squared
    sigma_fg = 2.0 * (c.sigma_f1**2 / c.mu**2 + c.sigma_g1**2 * c.l_f0**2 / c.mu**4)
    drift = 24.0 * (c.l_f0**2 / c.mu**2 + sigma_fg) * c.l_g2**2 + 12.0 * c.l_f**2
    needed = max(6.0 * (c.l_g**2 + c.sigma_g1**2) / c.mu**2, 9.0 * drift)
    return next(n for n in count(1) if needed * cg_contraction(c.kappa, n, unknowns) < 1.0)


def cg_contraction(kappa: float, steps: int, unknowns: int | None = None) -> float:
    r"""What N steps of conjugate gradient leave of a squared residual, at most.

    .. math:: \Gamma_N = \min\left\{\kappa, \;
              4 \kappa \left(\frac{\sqrt\kappa - 1}{\sqrt\kappa + 1}\right)^{2N}\right\}, \qquad
              \|A e^N\|^2 \le \Gamma_N \|A e^0\|^2 ,

    and 0 once N is the number of unknowns. The classical bound is of :math:`e^\top A e`, from
    which to the residual it is a factor :math:`\kappa`: Shewchuk (1994), eq. (52); Yang et al.
    (2025), Lemma 2 and eq. (81).

    Example:
        >>> [round(cg_contraction(10.0, steps), 4) for steps in (1, 5, 10)]
        [10.0, 0.0573, 0.0001]
        >>> cg_contraction(10.0, 5, unknowns=5)
        0.0
    """
    if unknowns is not None and steps >= unknowns:
        return 0.0
    rate = (math.sqrt(kappa) - 1.0) / (math.sqrt(kappa) + 1.0)
    return min(kappa, 4.0 * kappa * rate ** (2 * steps))


def hypergradient_lipschitz(constants: ProblemConstants) -> float:
    r"""L_F: a Lipschitz constant of the exact hypergradient.

    .. math:: L_F = (1 + \kappa) \left[ (1 + \kappa) \, l_f
              + l_{f,0} \left( \frac{l_{g,1}}{\mu} + \frac{l_g l_{g,2}}{\mu^2} \right) \right]

    The solution moves by at most :math:`\kappa` times theta, hence the first factor; within the
    brackets are the derivatives of f, of the mixed derivative and of the inverse Hessian. Gradient
    descent with a step of at most 1 / L_F decreases F. Ghadimi and Wang (2018), Lemma 2.2; Yang et
    al. (2025), Lemma 1.

    Example:
        >>> hypergradient_lipschitz(ProblemConstants(1.0, 10.0, 1.0, 1.0))
        121.0
    """
    c = constants
    inner = c.l_g1 / c.mu + c.l_g * c.l_g2 / c.mu**2
    return (1.0 + c.kappa) * ((1.0 + c.kappa) * c.l_f + c.l_f0 * inner)
