r"""Eq. (8) of Yang et al. (2025) for T linear heads: one batched solve, one mixed product.

The invariant and the formula are those of `l2l_implicit.implicit_diff`; tasks do not meet except
in what they share, the anchor and l2, whose hypergradients are sums over the tasks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from l2l_implicit import checks
from l2l_implicit.batched.diagnostics import BatchedDiagnostics
from l2l_implicit.batched.inner_solvers import InnerSolution
from l2l_implicit.batched.linear_solve import LinearSolver, asking_is_free
from l2l_implicit.batched.losses import SupportLoss
from l2l_implicit.batched.objective import BatchedLinearization, LinearObjective


class Solved(NamedTuple):
    """T solved inner problems, and how to solve their linear systems."""

    loss: SupportLoss
    inner: InnerSolution
    solver: LinearSolver
    diagnostics: BatchedDiagnostics
    anchored: bool


class BatchedImplicitSolution(Function):
    """The adapted heads as a function of theta: identity forward, eq. (8) backward.

    What the backward pass needs are saved tensors, which autograd frees after ``backward()``.
    """

    @staticmethod
    def forward(
        ctx: Any, solved: Solved, features: Tensor, l2: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        phi = solved.inner.phi
        ctx.loss, ctx.solver, ctx.diagnostics = solved.loss, solved.solver, solved.diagnostics
        ctx.shape, ctx.biased = weight.shape, bias is not None
        anchor = flat_head(weight, bias) if solved.anchored else None
        ctx.save_for_backward(features, l2, anchor, phi, solved.inner.logits)
        split = weight.numel()
        return phi[:, :split].unflatten(1, weight.shape), phi[:, split:]

    @staticmethod
    def backward(ctx: Any, *b: Tensor) -> tuple[Tensor | None, ...]:
        features, l2, anchor, phi, logits = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected a first derivative of the adapted heads' loss, got create_graph=True; "
                "the hypergradient cannot be differentiated again: detach it, or use unrolled MAML"
            )
        with torch.autocast(features.device.type, enabled=False):
            objective = LinearObjective(features, ctx.loss, l2, anchor, ctx.biased)
            at = BatchedLinearization(objective, phi, logits)
            answer = ctx.solver.solve(at, torch.cat([b[0].flatten(1), b[1]], 1))
            ctx.diagnostics.record(answer)
            if asking_is_free(features):  # elsewhere `tasks()` says it
                ctx.diagnostics.check_linear()
            products = _mixed(ctx, at, -answer.solution)
            if asking_is_free(features):
                checks.finite_products(products)
            return None, *products


def _mixed(ctx: Any, at: BatchedLinearization, v: Tensor) -> tuple[Tensor | None, ...]:
    """The products with features, l2 and the head's initial value that somebody wants."""
    wanted = ctx.needs_input_grad[1:]
    features = at.features_vjp(v) if wanted[0] else None
    l2 = at.l2_vjp(v) if wanted[1] else None
    anchored = at.objective.anchor is not None
    initial = at.anchor_vjp(v) if anchored else torch.zeros_like(v[0])
    split = ctx.shape.numel()
    in_weight = initial[:split].view(ctx.shape) if wanted[2] else None
    in_bias = initial[split:] if ctx.biased and wanted[3] else None
    return features, l2, in_weight, in_bias


def flat_head(weight: Tensor, bias: Tensor | None) -> Tensor:
    """A head as one vector ``[n]``."""
    return weight.reshape(-1) if bias is None else torch.cat([weight.reshape(-1), bias])
