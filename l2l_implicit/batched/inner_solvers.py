"""The inner problems of T linear heads, solved together and without autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from l2l_implicit.batched.linear_solve import LinearSolver, dot, none_left
from l2l_implicit.batched.objective import BatchedLinearization, LinearObjective

_ARMIJO, _CUTS = 1e-4, 16


class InnerSolution(NamedTuple):
    """Where the inner solver ended.

    Attributes:
        phi: ``[T, n]``.
        logits: the support logits there, ``[T, m, k]``.
        first_norm: norm of the first inner gradient, ``[T]``.
        norm: norm of the inner gradient at ``phi``, ``[T]``.
        steps: steps taken, ``[T]``.
    """

    phi: Tensor
    logits: Tensor
    first_norm: Tensor
    norm: Tensor
    steps: Tensor


def gradient_descent(
    objective: LinearObjective, start: Tensor, steps: int, lr: float
) -> InnerSolution:
    r"""K steps :math:`\phi - \lambda_\phi \nabla_\phi g`: Yang et al., Algorithm 1, line 8.

    Invariant: :math:`\phi = a + \alpha (\phi^0 - a) + X^\top C`, so that the logits follow from
    the Gram matrix and a step costs one product of ``[m, m]`` by ``[m, k]``, whatever d is.

    Args:
        objective: the inner objectives.
        start: :math:`\phi^0`, ``[T, n]``.
        steps: K.
        lr: the step size.
    """
    gram, loss = objective.gram(), objective.loss
    offset = objective.offset(start)
    drift, base = objective.logits(offset), objective.logits(start - offset)
    logits = base + drift
    first = _norm(objective.gradient(start, logits))
    shrink = 1.0 - lr * objective.l2
    alpha, coefficients = torch.ones_like(shrink), torch.zeros_like(logits)
    for _ in range(steps):
        coefficients = torch.addcmul(-lr * loss.gradient(logits), coefficients, shrink)
        alpha = alpha * shrink
        logits = torch.baddbmm(torch.addcmul(base, drift, alpha), gram, coefficients)
    phi = (start - offset) + alpha * offset + objective.in_phi(coefficients)
    return _finish(objective, phi, first, torch.full_like(first, steps, dtype=torch.long))


def newton(
    objective: LinearObjective,
    start: Tensor,
    steps: int,
    lr: float,
    solver: LinearSolver,
    tol: float,
) -> InnerSolution:
    """At most K damped Newton steps; a task whose gradient is small enough stays where it is.

    Each step's length is the largest of a few halvings that satisfies the Armijo rule. Along a
    line the logits are linear, so that all lengths are tried at once.

    Args:
        objective: the inner objectives.
        start: ``[T, n]``.
        steps: K; fewer where `none_left` may be asked.
        lr: length of the gradient step that stands in for a direction that does not descend.
        solver: finds the directions.
        tol: the gradient's norm, relative to its first, at which a task's phi stays.
    """
    gram = objective.gram() if solver.direct else None
    phi, logits = start, objective.logits(start)
    first = taken = torch.zeros_like(phi[:, 0])
    stop = max(tol, 10 * torch.finfo(phi.dtype).eps)
    for step in range(steps):
        gradient = objective.gradient(phi, logits)
        norm = _norm(gradient)
        first = norm if step == 0 else torch.maximum(first, norm)
        active = ~(norm <= stop * first)
        if none_left(active, step, solver.ask_every):
            break
        at = BatchedLinearization(objective, phi, logits)
        forcing = (norm / torch.where(first > 0, first, 1.0)).clamp(max=0.1)
        direction = -solver.direction(at, gradient, forcing, gram)
        descends = (dot(direction, gradient) < 0).unsqueeze(1)
        direction = torch.where(descends, direction, -lr * gradient)
        length = torch.where(active, _length(at, direction, gradient), 0.0).unsqueeze(1)
        phi, taken = torch.addcmul(phi, length, direction), taken + active
        logits = objective.logits(phi)
    return _finish(objective, phi, first, taken.long())


def _length(at: BatchedLinearization, direction: Tensor, gradient: Tensor) -> Tensor:
    """The largest of 1, 1/2, 1/4, ... that satisfies the Armijo rule, ``[T]``; 0 if none does."""
    objective = at.objective
    powers = torch.arange(_CUTS, device=gradient.device, dtype=gradient.dtype)
    lengths = torch.exp2(-powers).unsqueeze(1)  # [cuts, 1]
    change = objective.logits(direction)
    trials = torch.addcmul(at.logits, lengths.view(-1, 1, 1, 1), change)
    offset = objective.offset(at.phi)
    linear, square = dot(offset, direction), dot(direction, direction)
    now = objective.loss.value(at.logits)
    penalty = objective.l2 * lengths * (linear + 0.5 * lengths * square)
    gained = objective.loss.value(trials) - now + penalty  # [cuts, T]
    scale = now.abs() + 0.5 * objective.l2 * dot(offset, offset)
    rounding = 10 * torch.finfo(now.dtype).eps * scale
    enough = gained <= _ARMIJO * lengths * dot(direction, gradient) + rounding
    return torch.where(enough, lengths, 0.0).amax(0)


def _norm(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=1)


def _finish(
    objective: LinearObjective, phi: Tensor, first_norm: Tensor, steps: Tensor
) -> InnerSolution:
    logits = objective.logits(phi)
    norm = _norm(objective.gradient(phi, logits))
    return InnerSolution(phi, logits, first_norm, norm, steps)
