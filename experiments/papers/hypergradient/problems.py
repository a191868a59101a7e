r"""Two tasks with an exact hypergradient, and the learners that approximate it.

The inner objective of both is :math:`\text{loss}(\theta, \phi) + \tfrac{l_2}{2} \|\phi - a\|^2`,
in float64. In the regression theta is the initial value of phi and the anchor a; in the
classification it is the feature extractor, and a = 0.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from experiments.ingredients.algorithm import solvers
from l2l_implicit import ImplicitCGHead, ImplicitMAML
from l2l_implicit.baselines import UnrolledMAML

CG_TOL = 1e-14  # all conjugate gradient steps are taken
IGNORED = 1e300  # error above which a learner would warn: here it is what is measured


class Problem(ABC):
    """One task.

    Attributes:
        l2: strength of the regulariser.
        lr: inner step size, 1 over the largest curvature.
        condition: the inner problem's condition number.
    """

    l2: float
    lr: float
    condition: float

    @abstractmethod
    def implicit(self, cg_steps: int) -> Any:
        """The implicit learner with gradient steps inside and N steps of conjugate gradient."""

    @abstractmethod
    def unrolled(self) -> Any:
        """Back-propagation through the inner loop."""

    @abstractmethod
    def exact(self) -> Tensor:
        """The hypergradient as one vector, by dense matrices at the exact inner solution."""

    @abstractmethod
    def estimate(self, learner: Any, steps: int, penalty: bool) -> Tensor:
        """What the learner makes of it with K = ``steps``, as one vector.

        Args:
            learner: `implicit` or `unrolled`.
            steps: inner steps.
            penalty: the regulariser is in the loss (an unrolled learner has none of its own).
        """


class Regression(Problem):
    r"""Ill-conditioned linear regression with one output, anchored at theta as in iMAML.

    The support loss is :math:`\tfrac{1}{2m} \|X \phi - y\|^2`; eigenvalues of
    :math:`X^\top X / m` fall from 1 to ``1 / spread``, evenly on a logarithmic scale.

    Args:
        size: dimension of phi.
        spread: largest over smallest eigenvalue, before ``l2`` is added.
        l2: the paper's lambda.
        seed: of the data.
    """

    def __init__(self, size: int, spread: float, l2: float, seed: int) -> None:
        draw = _draw(seed)
        rotation, _ = torch.linalg.qr(draw(size, size))
        left, _ = torch.linalg.qr(draw(2 * size, size))
        eigenvalues = torch.logspace(0, -torch.log10(torch.tensor(spread)), size).double()
        self.support = (2 * size) ** 0.5 * left @ torch.diag(eigenvalues.sqrt()) @ rotation.T
        self.query = draw(2 * size, size)
        truth = draw(size)
        self.targets = self.support @ truth + 0.1 * draw(2 * size)
        self.query_targets = self.query @ truth
        self.l2, self.lr = l2, 1.0 / (1.0 + l2)
        self.condition = (1.0 + l2) / (float(eigenvalues[-1]) + l2)
        self.theta = draw(size)

    def implicit(self, cg_steps: int) -> Any:
        return ImplicitMAML(
            self._module(), self.lr, l2=self.l2, max_error=IGNORED, **_gradient_steps(cg_steps)
        )

    def unrolled(self) -> Any:
        return UnrolledMAML(self._module(), self.lr)

    def exact(self) -> Tensor:
        r""":math:`l_2 H^{-1} \nabla f(\phi^*)` with H the inner Hessian."""
        m, n = self.support.shape
        curvature = self.support.T @ self.support / m + self.l2 * torch.eye(n).double()
        right = self.support.T @ self.targets / m + self.l2 * self.theta
        solution = torch.linalg.solve(curvature, right)
        residual = self.query @ solution - self.query_targets
        slope = self.query.T @ residual / len(self.query)
        return self.l2 * torch.linalg.solve(curvature, slope)

    def estimate(self, learner: Any, steps: int, penalty: bool) -> Tensor:
        (theta,) = learner.module.parameters()
        clone = learner.clone()

        def inner() -> Tensor:
            loss = 0.5 * mse_loss(clone(self.support)[:, 0], self.targets)
            if not penalty:
                return loss
            (phi,) = clone.module.parameters()
            return loss + 0.5 * self.l2 * (phi - theta).square().sum()

        clone.adapt(inner, steps=steps)
        outer = 0.5 * mse_loss(clone(self.query)[:, 0], self.query_targets)
        (hypergradient,) = torch.autograd.grad(outer, [theta])
        return hypergradient[0]

    def _module(self) -> nn.Linear:
        module = nn.Linear(len(self.theta), 1, bias=False, dtype=torch.float64)
        module.weight.data.copy_(self.theta)
        return module


class Classification(Problem):
    """A logistic head on the features of one dense layer, which is theta.

    Args:
        ways, shots, width: classes, support and query samples of each, features.
        l2: of the head.
        seed: of the data and the layer.
    """

    def __init__(self, ways: int, shots: int, width: int, l2: float, seed: int) -> None:
        draw = _draw(seed)
        centers, raw = draw(ways, 2 * width), 2 * width
        self.labels = torch.arange(ways).repeat_interleave(shots)
        self.inputs = [centers[self.labels] + 1.5 * draw(ways * shots, raw) for _ in range(2)]
        self.layer = (1.5 / raw**0.5 * draw(raw, width)).requires_grad_()
        self.head = nn.Linear(width, ways, bias=False, dtype=torch.float64)
        self.head.weight.data.copy_(draw(ways, width) / width**0.5)
        self.l2 = l2
        features = torch.tanh(self.inputs[0] @ self.layer.detach())
        # The Hessian of the softmax is at most 1/2.
        largest = 0.5 * float(torch.linalg.matrix_norm(features, 2).square()) / len(features) + l2
        self.lr, self.condition = 1.0 / largest, largest / l2

    def implicit(self, cg_steps: int) -> Any:
        return ImplicitCGHead(
            copy.deepcopy(self.head), self.lr, l2=self.l2, max_error=IGNORED,
            **_gradient_steps(cg_steps),
        )  # fmt: skip

    def unrolled(self) -> Any:
        return UnrolledMAML(copy.deepcopy(self.head), self.lr, learn_init=False)

    def exact(self) -> Tensor:
        """Eq. (4) of Yang et al."""
        layer = self.layer.detach()
        phi = self._solve(layer)
        v = torch.linalg.solve(hessian(self._inner)(phi, layer), grad(self._outer)(phi, layer))
        mixed = jacrev(grad(self._inner), argnums=1)(phi, layer)
        direct = grad(self._outer, argnums=1)(phi, layer)
        return (direct - torch.tensordot(v, mixed, dims=1)).reshape(-1)

    def estimate(self, learner: Any, steps: int, penalty: bool) -> Tensor:
        clone = learner.clone()
        support, query = (torch.tanh(x @ self.layer) for x in self.inputs)

        def inner() -> Tensor:
            loss = cross_entropy(clone(support), self.labels)
            if not penalty:
                return loss
            return loss + 0.5 * self.l2 * clone.module.weight.square().sum()

        clone.adapt(inner, steps=steps)
        outer = cross_entropy(clone(query), self.labels)
        (hypergradient,) = torch.autograd.grad(outer, [self.layer])
        return hypergradient.reshape(-1)

    def _solve(self, layer: Tensor) -> Tensor:
        """The inner solution by Newton's method from zero, to rounding; the problem is convex."""
        phi = torch.zeros(self.head.weight.numel()).double()
        for _ in range(50):
            slope = grad(self._inner)(phi, layer)
            if slope.norm() < 1e-14:
                break
            direction = torch.linalg.solve(hessian(self._inner)(phi, layer), slope)
            phi = phi - self._length(phi, direction, layer) * direction
        return phi

    def _length(self, phi: Tensor, direction: Tensor, layer: Tensor) -> float:
        """1, halved until the objective does not rise beyond rounding."""
        here, length = float(self._inner(phi, layer)), 1.0
        while float(self._inner(phi - length * direction, layer)) > here + 1e-13 and length > 1e-6:
            length *= 0.5
        return length

    def _inner(self, phi: Tensor, layer: Tensor) -> Tensor:
        loss = self._loss(phi, torch.tanh(self.inputs[0] @ layer))
        return loss + 0.5 * self.l2 * phi.square().sum()

    def _outer(self, phi: Tensor, layer: Tensor) -> Tensor:
        return self._loss(phi, torch.tanh(self.inputs[1] @ layer))

    def _loss(self, phi: Tensor, features: Tensor) -> Tensor:
        logits = features @ phi.view(self.head.weight.shape).T
        targets = one_hot(self.labels, logits.shape[1]).double()
        return -(targets * logits.log_softmax(1)).sum(1).mean()


def _gradient_steps(cg_steps: int) -> dict[str, Any]:
    return solvers(step="gradient", cg_steps=cg_steps, cg_tol=CG_TOL)


def _draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


class Method(NamedTuple):
    """How a problem's learner is made, and whether its loss carries the regulariser."""

    make: Callable[[Problem], Any]
    penalty: bool


def methods(names: tuple[str, str], cg_steps: Sequence[int]) -> dict[str, Method]:
    """Every method by the name under which it is recorded.

    Args:
        names: of the implicit and of the unrolled algorithm.
        cg_steps: the numbers N of conjugate gradient steps.
    """
    implicit, unrolled = names
    found = {f"{implicit}_cg{n}": Method(lambda p, n=n: p.implicit(n), False) for n in cg_steps}
    found[unrolled] = Method(lambda problem: problem.unrolled(), True)
    found[f"{unrolled}_unregularised"] = Method(lambda problem: problem.unrolled(), False)
    return found
