r"""The Gauss-Newton matrix of a whole network in place of its Hessian: objects for ``curvature=``.

The inner loss is a function of the network's outputs :math:`z(\phi)`. With J the derivative of the
outputs in phi and :math:`H_L` the loss's Hessian in the outputs,

.. math:: \nabla^2 \text{loss} = J^\top H_L J + \sum_i \frac{\partial \text{loss}}{\partial z_i}
          \nabla^2 z_i, \qquad G = J^\top H_L J .
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from l2l_implicit.inner_problem import refusals
from l2l_implicit.inner_problem.boundary import cut, edges_of, find_outputs, marked_by
from l2l_implicit.inner_problem.linearization import (
    AutogradLinearization,
    flat,
    gradients_of,
    pulled_back,
)  # fmt: skip
from l2l_implicit.vectors import unflatten


class Curvature(Protocol):
    """Says which matrix stands for the Hessian of a whole network's inner loss.

    Attributes:
        notes_passes: whether the learner's ``forward`` is to note each `Pass`.
    """

    notes_passes: bool

    def linearize(
        self, loss: Tensor, parameters: Sequence[Tensor], **options: Any
    ) -> AutogradLinearization:
        """The linearization of ``loss``; arguments as in `AutogradLinearization`."""
        ...


@dataclass(frozen=True)
class Hessian:
    """The Hessian itself, by double backward: exact, and indefinite away from a minimum.

    Example:
        >>> from torch import nn
        >>> from l2l_implicit import CG, Hessian, ImplicitMAML
        >>> maml = ImplicitMAML(nn.Linear(4, 2), lr=0.1, curvature=Hessian(), linear=CG(damping=20))
    """

    notes_passes = False

    def linearize(
        self, loss: Tensor, parameters: Sequence[Tensor], **options: Any
    ) -> AutogradLinearization:
        """Both products by backward passes of the gradient's graph."""
        return AutogradLinearization(loss, parameters, **options)


@dataclass(frozen=True)
class GaussNewton:
    r"""The Gauss-Newton matrix :math:`G = J^\top H_L J`, by forward mode and one backward pass.

    Positive semidefinite where the loss is convex in the outputs, as cross-entropy and squared
    error are, whatever the network: with ``l2`` conjugate gradient meets no negative curvature,
    and Newton's direction is one of descent. A product takes half the memory of the Hessian's.
    The hypergradient is the one of the network linearized at the solution: it is the true one
    where the loss's gradient in the outputs vanishes (a support set that is fitted), and where the
    network is linear in phi. The mixed product of eq. (8) stays exact.

    What the loss has of phi besides the outputs, a penalty on the weights say, enters with its own
    Hessian. A linear head that is recognised has its Hessian, which is the same matrix.

    Args:
        fallback: warn, and take the Hessian, where there is no such product, else an error.
            An operation may have no forward mode (``nn.LSTM``, ``weight_norm``, a custom
            ``autograd.Function`` without ``jvp``), the loss may pass by ``learner(...)``, or
            outputs of it may be inputs again. (Fused attention has none either: in forward mode it
            is computed in steps, as with ``SDPBackend.MATH``, from torch 2.3 on.)

    Raises:
        RuntimeError: at the first product, in one line: one of these; or a second pass of the
            module that gives something else than the first.

    References:
        Schraudolph (2002), *Fast curvature matrix-vector products*; Martens (2010), *Deep learning
        via Hessian-free optimization*.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit import GaussNewton, ImplicitMAML
        >>> network = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
        >>> maml = ImplicitMAML(network, lr=0.1, l2=0.5, curvature=GaussNewton())
        >>> x, y, loss = torch.randn(25, 20), torch.arange(25) % 5, nn.CrossEntropyLoss()
        >>> learner = maml.clone()
        >>> learner.adapt(lambda: loss(learner(x), y), steps=8)
        >>> loss(learner(x), y).backward()
        >>> maml.diagnostics.cg_reason
        'converged'
    """

    fallback: bool = False
    notes_passes = True

    def linearize(
        self, loss: Tensor, parameters: Sequence[Tensor], **options: Any
    ) -> AutogradLinearization:
        """The gradient by one backward pass, whose graph is kept for the products."""
        return GaussNewtonLinearization(loss, parameters, fallback=self.fallback, **options)


class GaussNewtonLinearization(AutogradLinearization):
    """Of a loss of the outputs of noted passes, T = 1: products with the Gauss-Newton matrix.

    Kept are the graph of the loss, which is that of one gradient, and the loss's own gradient in
    the outputs with its graph, which is small. The gradient's graph through the network is made for
    the mixed product alone, where theta enters otherwise than by the anchor and l2.
    """

    def __init__(
        self, loss: Tensor, parameters: Sequence[Tensor], *, fallback: bool, **options: Any
    ) -> None:
        super().__init__(loss, parameters, keeps_second=False, **options)
        self._fallback, self._use_hessian = fallback, False
        if not self.differentiable:
            return
        self._passes, around = find_outputs(loss, parameters)
        self._refusal = _refusal(self._passes)
        self._edges = edges_of(self._passes)
        self._direct = list(parameters) if around else []
        with cut(self._passes):
            self._slopes = gradients_of(
                loss, [*self._edges, *self._direct], create_graph=True, allow_unused=True
            )

    @property
    def needs_second(self) -> bool:
        inputs = self._inputs
        return bool(self._use_hessian or inputs.boundaries or inputs.leaves or self._stand_ins)

    def hvp(self, vector: Tensor) -> Tensor:
        if not self._use_hessian:
            refusal, cause = self._refusal, None
            if refusal is None:
                try:
                    return self._gauss_newton(vector).add_(vector, alpha=self.quadratic.strength)
                except NotImplementedError as error:  # torch's own, where forward mode is missing
                    refusal, cause = refusals.of_forward_mode(error), error
            if not self._fallback:
                raise RuntimeError(f"GaussNewton: {refusal}") from cause
            got = refusal.partition(";")[0]  # what to do has been done
            warnings.warn(f"GaussNewton: {got}; here the Hessian takes its place", stacklevel=2)
            self._use_hessian, self._gradients = True, self._graph()
        return self.derivative(vector)

    def _gauss_newton(self, vector: Tensor) -> Tensor:
        """The product with what the loss has, without the regulariser in closed form."""
        pieces = unflatten(vector[0], self.parameters)
        outputs, tangents = list[Tensor](), list[Tensor | None]()
        for node in self._passes:
            first = marked_by(node)
            second = node.made_by.tangents(self.parameters, pieces)
            _check_same(first, [z for z, _ in second])
            outputs += first
            tangents += [d for _, d in second]
        # The loss's change along the tangents is that along the gradient.
        gradient = self.loss_gradient
        if self._direct:
            gradient = gradient - flat(self._slopes[len(tangents) :], self.parameters).detach()
        _check_equal(self._slopes[: len(tangents)], tangents, gradient, vector)
        moved = [*tangents, *(pieces if self._direct else [])]
        with cut(self._passes):
            curved = pulled_back(self._slopes, [*self._edges, *self._direct], moved)
        found = pulled_back(outputs, self.parameters, curved[: len(outputs)])
        product = flat(found, self.parameters)
        _check_equal(curved[: len(tangents)], tangents, product, vector)
        if self._direct:
            product += flat(curved[len(outputs) :], self.parameters)
        return product


def _tol(like: Tensor) -> float:
    return float(torch.finfo(like.dtype).eps ** (1 / 3))


def _check_equal(
    ends: Sequence[Tensor | None], tangents: Sequence[Tensor | None], back: Tensor, vector: Tensor
) -> None:
    """That forward mode and the backward pass are of one function, by two numbers: the tangents'
    product with what goes back from the outputs, the vector's with what arrives."""
    both = zip(ends, tangents, strict=True)
    pairs = [(x.detach(), y) for x, y in both if x is not None and y is not None]
    a = math.fsum(float((x * y).sum()) for x, y in pairs)
    b, eps = float((back * vector).sum()), torch.finfo(vector.dtype).eps
    size = max(math.fsum(float(x.norm() * y.norm()) for x, y in pairs), abs(b))
    rounding = float(back.norm() * vector.norm())
    if math.isfinite(a) and not abs(a - b) <= _tol(vector) * size + 100 * eps * rounding:
        raise RuntimeError(
            "GaussNewton: expected one derivative of the module's outputs, got another by forward "
            f"mode than by the backward pass ({a:.6g} and {b:.6g}): a detached piece, "
            "torch.no_grad() inside, a custom operator without forward mode, a module that is not "
            "among its own children, or weights that have moved (activation checkpointing); use "
            "curvature=Hessian()"
        )


def _check_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    same = len(first) == len(second)
    for z, again_ in zip(first, second, strict=False):
        size = z.detach().norm()
        close = z.shape == again_.shape and bool((z.detach() - again_).norm() <= _tol(z) * size)
        same = same and (close or not bool(size.isfinite()))
    if not same:
        raise RuntimeError(
            "GaussNewton: expected the same outputs when the module runs again on its inputs, got "
            "others: inputs were changed in place, or it draws numbers of its own or counts its "
            "passes; clone the inputs, or use curvature=Hessian()"
        )


def _refusal(passes: Sequence[Any]) -> str | None:
    """Why there is no product with a loss of the outputs of these passes, if there is none."""
    if not passes:
        return (
            "expected a loss of the outputs of learner(...), got one that does not use them; call "
            "the learner, not its module, or use curvature=Hessian()"
        )
    if any(node.made_by.inner_inputs() for node in passes):
        return (
            "expected inputs of learner(...) that do not depend on its parameters, got some that "
            "do, such as outputs given back to it; use GaussNewton(fallback=True), or "
            "curvature=Hessian()"
        )
    return None
