r"""The error of the hypergradient over inner steps: Rajeswaran et al. (2019), Figure 2a.

    python -m experiments.papers.hypergradient
    python -m experiments.papers.hypergradient with quick

On an ill-conditioned linear regression iMAML against MAML, as in the paper; on a logistic head
Algorithm 1 of Yang et al. (2025) against iterative differentiation.

The inner objective of both is :math:`\text{loss}(\theta, \phi) + \tfrac{l_2}{2} \|\phi - a\|^2`,
in float64. In the regression theta is the initial value of phi and the anchor a; in the
classification it is the feature extractor, and a = 0.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from statistics import geometric_mean
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from scipy.optimize import root
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

from experiments.ingredients.model import within_limits
from experiments.papers import PaperSettings, Points
from experiments.report.papers import named
from experiments.tracking import TrackedExperiment
from experiments.tracking.config import Count, Counts, Positive
from l2l_implicit import CG, GradientDescent, ImplicitCGHead, ImplicitMAML, UnsolvedWarning
from l2l_implicit.baselines import UnrolledMAML
from l2l_implicit.vectors import unflatten

CG_TOL = 1e-14  # all conjugate gradient steps are taken
IGNORED = 1e300  # error above which a learner would warn: here it is what is measured
LEAST = 1e-17  # below rounding: an error that is zero has a logarithm too


class HypergradientSettings(PaperSettings):
    """The settings of this experiment."""

    problems: Count = 3  # drawn anew; errors are their geometric mean
    inner_steps: Counts = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]  # K
    cg_steps: Counts = [2, 5, 10]  # N of iMAML
    head_cg_steps: Counts = [2, 5, 10, 20]  # N of Algorithm 1
    # parameters; conjugate gradient is exact after as many steps
    regression_sizes: Counts = [5, 20]
    # largest over smallest eigenvalue of the regression, without regulariser
    spread: Annotated[float, Field(ge=1)] = 1000.0
    regression_l2: Positive = 0.01  # iMAML's lambda
    ways: Count = 5  # of the classification
    shots: Count = 5  # of the classification
    width: Count = 16  # features
    classification_l2: Positive = 0.01  # of the heads


ex = TrackedExperiment("hypergradient", settings=HypergradientSettings)


@ex.named_config
def quick() -> None:
    """One problem of each kind, at most 200 inner steps: seconds."""
    problems = 1
    inner_steps = [1, 5, 20, 50, 200]


class Method(NamedTuple):
    """How the hypergradient is approximated."""

    cg_steps: int | None  # N of the implicit learner; None: back-propagation through the steps
    penalty: bool = False  # the regulariser is in the loss (an unrolled learner has none)


class Problem:
    """One task, by what is adapted (phi) and what is meta-learned (theta)."""

    kind: type[ImplicitCGHead] | type[ImplicitMAML]  # the latter's theta is phi's initial value
    module: nn.Module  # what is adapted
    theta: Tensor
    l2: float  # strength of the regulariser
    lr: float  # inner step size, 1 over the largest curvature
    condition: float  # the inner problem's condition number
    inputs: Sequence[Tensor]  # support and query
    targets: Sequence[Tensor]

    def features(self, theta: Tensor) -> Sequence[Tensor]:
        """What the module sees of support and query."""
        return self.inputs

    def fit(self, outputs: Tensor, split: int) -> Tensor:
        """The loss of the module's outputs on support (0) or query (1)."""
        return cross_entropy(outputs, self.targets[split])

    @property
    def anchored(self) -> bool:
        """Whether the regulariser draws phi to theta; else to 0."""
        return self.kind is ImplicitMAML

    def _loss(self, phi: Tensor, theta: Tensor, split: int) -> Tensor:
        names, parameters = zip(*self.module.named_parameters(), strict=True)
        values = dict(zip(names, unflatten(phi, parameters), strict=True))
        return self.fit(functional_call(self.module, values, self.features(theta)[split]), split)

    def _inner(self, phi: Tensor, theta: Tensor) -> Tensor:
        far = phi - theta if self.anchored else phi
        return self._loss(phi, theta, 0) + 0.5 * self.l2 * far.square().sum()

    def exact(self) -> Tensor:
        """Eq. (4) of Yang et al. as one vector, by dense matrices at the exact inner solution.

        ArithmeticError: it is 0, or no number, so that no error is relative to it.
        """
        theta, outer = self.theta.detach(), partial(self._loss, split=1)
        phi = parameters_to_vector(self.module.parameters()).detach()
        for _ in range(500):  # to the minimum that the inner loops lead to, where there are several
            phi = phi - self.lr * grad(self._inner)(phi, theta)
        found = root(
            lambda phi: grad(self._inner)(torch.from_numpy(phi), theta).numpy(), phi.numpy(),
            jac=lambda phi: hessian(self._inner)(torch.from_numpy(phi), theta).numpy(), tol=1e-15,
        )  # fmt: skip
        phi = torch.from_numpy(found.x)
        v = torch.linalg.solve(hessian(self._inner)(phi, theta), grad(outer)(phi, theta))
        mixed = jacrev(grad(self._inner), argnums=1)(phi, theta)
        direct = grad(outer, argnums=1)(phi, theta)
        found = (direct - torch.tensordot(v, mixed, dims=1)).reshape(-1)
        if not found.norm() > 0:
            raise ArithmeticError(f"an exact hypergradient of size {found.norm():g}")
        return found

    def implicit(self, **solvers: Any) -> ImplicitCGHead | ImplicitMAML:
        """Its learner with these solvers."""
        module = copy.deepcopy(self.module)
        return self.kind(module, self.lr, l2=self.l2, max_error=IGNORED, **solvers)

    def unrolled(self) -> UnrolledMAML:
        """The learner that back-propagates through the steps, without a regulariser."""
        return UnrolledMAML(copy.deepcopy(self.module), self.lr, learn_init=self.anchored)

    def estimate(self, method: Method, steps: int) -> Tensor:
        """What a method makes of it with K = ``steps``, as one vector."""
        n = method.cg_steps
        learner = (self.unrolled() if n is None
                   else self.implicit(inner=GradientDescent(), linear=CG(n, CG_TOL)))
        return self.differentiate(learner, steps, method.penalty)[0]

    def differentiate(self, learner: Any, steps: int, penalty: bool) -> tuple[Tensor, float]:
        """A learner's hypergradient after K = ``steps``, with the regulariser in the loss or not.

        And the milliseconds that ``backward()`` took, with ``penalty`` all the inner steps too.
        """
        anchors = list(learner.module.parameters())
        theta = anchors if self.anchored else [self.theta]
        clone, (support, query) = learner.clone(), self.features(self.theta)

        def inner() -> Tensor:
            loss = self.fit(clone(support), 0)
            if penalty:
                far = parameters_to_vector(clone.module.parameters())
                if self.anchored:
                    far = far - parameters_to_vector(anchors)
                loss = loss + 0.5 * self.l2 * far.square().sum()
            return loss

        begin = time.process_time()
        clone.adapt(inner, steps=steps)
        outer = self.fit(clone(query), 1)
        if not penalty:
            begin = time.process_time()
        gradients = torch.autograd.grad(outer, theta)
        passed = 1e3 * (time.process_time() - begin)
        return torch.cat([gradient.flatten() for gradient in gradients]), passed


class Regression(Problem):
    r"""Ill-conditioned linear regression with one output, anchored at theta as in iMAML.

    The support loss is :math:`\tfrac{1}{2m} \|X \phi - y\|^2`; eigenvalues of
    :math:`X^\top X / m` fall from 1 to ``1 / spread``, evenly on a logarithmic scale; ``l2``, the
    paper's lambda, is added to them.
    """

    kind = ImplicitMAML

    def __init__(self, size: int, spread: float, l2: float, seed: int) -> None:
        draw = _draw(seed)
        rotation, _ = torch.linalg.qr(draw(size, size))
        left, _ = torch.linalg.qr(draw(2 * size, size))
        eigenvalues = torch.logspace(0, -torch.log10(torch.tensor(spread)), size).double()
        support = (2 * size) ** 0.5 * left @ torch.diag(eigenvalues.sqrt()) @ rotation.T
        self.inputs = [support, draw(2 * size, size)]
        truth = draw(size)
        self.targets = [support @ truth + 0.1 * draw(2 * size), self.inputs[1] @ truth]
        self.l2, self.lr = l2, 1.0 / (1.0 + l2)
        self.condition = (1.0 + l2) / (float(eigenvalues[-1]) + l2)
        self.theta = draw(size)
        self.module = nn.Linear(size, 1, bias=False, dtype=torch.float64)
        self.module.weight.data.copy_(self.theta)

    def fit(self, outputs: Tensor, split: int) -> Tensor:
        return 0.5 * mse_loss(outputs[:, 0], self.targets[split])


class Classification(Problem):
    """A logistic head on the features (``width``) of one dense layer, which is theta."""

    kind = ImplicitCGHead

    def __init__(self, ways: int, shots: int, width: int, l2: float, seed: int) -> None:
        draw = _draw(seed)
        centers, raw = draw(ways, 2 * width), 2 * width
        labels = torch.arange(ways).repeat_interleave(shots)
        self.targets = [labels, labels]
        self.inputs = [centers[labels] + 1.5 * draw(ways * shots, raw) for _ in range(2)]
        self.theta = (1.5 / raw**0.5 * draw(raw, width)).requires_grad_()
        self.module = nn.Linear(width, ways, bias=False, dtype=torch.float64)
        self.module.weight.data.copy_(draw(ways, width) / width**0.5)
        self.l2 = l2
        features = self.features(self.theta.detach())[0]
        # The Hessian of the softmax is at most 1/2.
        largest = 0.5 * float(torch.linalg.matrix_norm(features, 2).square()) / len(features) + l2
        self.lr, self.condition = 1.0 / largest, largest / l2

    def features(self, theta: Tensor) -> Sequence[Tensor]:
        return [torch.tanh(x @ theta) for x in self.inputs]


def _draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def methods(names: tuple[str, str], cg_steps: Sequence[int]) -> dict[str, Method]:
    """Every method by its name in the records, from those of an implicit and an unrolled one."""
    implicit, unrolled = names
    found = {f"{implicit}_cg{n}": Method(n) for n in cg_steps}
    return found | {unrolled: Method(None, True), f"{unrolled}_unregularised": Method(None)}


def _problems(c: HypergradientSettings) -> dict[str, tuple[list[Problem], dict[str, Method]]]:
    """The problems of every kind, and the methods they are for."""
    seeds = [1000 * c.seed + i for i in range(c.problems)]
    imaml = methods(("imaml", "maml"), c.cg_steps)
    made: dict[str, tuple[list[Problem], dict[str, Method]]] = {
        f"regression_{n}": ([Regression(n, c.spread, c.regression_l2, s) for s in seeds], imaml)
        for n in c.regression_sizes
    }
    shape = (c.ways, c.shots, c.width, c.classification_l2)
    heads = methods(("rm_metal", "itd_bio"), c.head_cg_steps)
    return made | {"logistic": ([Classification(*shape, s) for s in seeds], heads)}


@ex.automain
@within_limits()
def hypergradient(_run: Any) -> dict[str, float]:
    """Print the errors, geometric means over the problems; returns those at the largest K."""
    c = HypergradientSettings.of(_run.config)
    points = Points(_run, c)
    inner_steps, kinds = sorted(set(c.inner_steps)), _problems(c)
    total = c.problems * sum(inner_steps) * sum(len(by_name) for _, by_name in kinds.values())
    with warnings.catch_warnings(), tqdm(total=total, desc="inner steps", mininterval=1.0) as bar:
        warnings.simplefilter("ignore", UnsolvedWarning)  # too few steps is what is measured
        for title, (tasks, by_name) in kinds.items():
            exact = [task.exact() for task in tasks]
            for (name, method), steps in product(by_name.items(), inner_steps):
                errors = []
                for task, truth in zip(tasks, exact, strict=True):
                    error = (task.estimate(method, steps) - truth).norm() / truth.norm()
                    errors.append(max(float(error), LEAST))
                    bar.update(steps)
                points.record({f"hypergradient/{title}/{name}": geometric_mean(errors)}, steps)
            tqdm.write(f"{title}: condition number {tasks[0].condition:.0f}")
    curves = named(points.metrics, "hypergradient/(.+)")
    result = {name: float(curve.iloc[-1]) for name, curve in curves.items()}
    points.show("hypergradient", result)
    return result
