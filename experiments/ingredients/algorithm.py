"""The algorithm: one object behind learn2learn's ``clone`` and ``adapt``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import learn2learn as l2l
import torch
from torch import nn

import l2l_implicit as implicit
from experiments.ingredients import algorithm_table as table
from experiments.ingredients.algorithm_table import AlgorithmSettings
from experiments.tracking import TrackedIngredient, UserError, wrong
from experiments.training import algorithms as learning
from experiments.training.algorithms import Algorithm, Algorithms, Loss
from l2l_implicit.baselines import Learn2LearnMAML, Reptile, UnrolledMAML

algorithm = TrackedIngredient("algorithm", settings=AlgorithmSettings)
MOST_BYTES = 2**30  # of the tasks' graphs that together=auto keeps on a CPU
ANY_STEP_SIZE = 0.1  # for a learner whose inner solver has a step size of its own


def make_algorithms(
    settings: AlgorithmSettings, backbone: nn.Module, width: int, outputs: int,
    test_outputs: int, loss: Loss, device: torch.device,
) -> Algorithms:  # fmt: skip
    """The configured algorithm on a backbone and a linear head; UserError: what it cannot do.

    Args:
        backbone: inputs to ``width`` features, on the ``device``.
        outputs, test_outputs: of the head, in training and in evaluation.
        loss: of predictions and targets: the mean cross-entropy or squared error.
    """
    head = nn.Linear(width, outputs).to(device)
    try:
        return _build(settings, backbone, head, test_outputs, loss)
    except (ValueError, TypeError) as error:
        raise UserError(f"algorithm.{error}") from error


def _build(
    s: AlgorithmSettings, backbone: nn.Module, head: nn.Linear, test_outputs: int, loss: Loss
) -> Algorithms:
    if s.name in table.OF_CLASSES and not isinstance(loss, nn.CrossEntropyLoss):
        raise wrong(f"name={s.name}", "tasks of classes", "a regression", "use ImplicitCGHead")
    learn, test_steps, initial = _learner(s), s.test_steps or s.steps, head
    if s.batch_norm == "eval":  # running statistics, from now on
        for module in backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    if (trained := head.out_features) != test_outputs:
        if s.scope == "network" or s.name in table.LEARNED_INITIAL_HEAD:
            raise wrong(f"name={s.name}", f"test_ways={trained} as in training", test_outputs,
                        "the initial head is meta-learned and has that many outputs: use "
                        "ImplicitCGHead or itd_bio, or equal ways")
        head = nn.Linear(head.in_features, test_outputs).to(head.weight.device)
    training: Algorithm
    evaluation: Algorithm
    if s.scope == "head":
        how: dict[str, Any] = {"together": s.batch_norm == "together"}
        seen = learning.TenCrops(backbone) if s.test_crops is not None else backbone
        if s.name == "protonet":
            training, evaluation = (
                learning.Prototypes(network, nn.Identity(), 0, loss, **how)
                for network in (backbone, seen)
            )
            return Algorithms(training, evaluation, backbone, nn.Identity())
        how |= {"cached": s.features == "cached", "squared": s.name == "r2d2"}
        if s.scale is not None:
            how["scale"] = l2l.nn.Scale(1, s.scale).to(head.weight.device)
        tested = learn if s.test_l2 is None else _learner(s.model_copy(update={"l2": s.test_l2}))
        evaluation = learning.HeadOnly(seen, tested(head), test_steps, loss, **how)
        arguments = (backbone, learn(initial), s.steps, loss)
        if s.together == "auto" and s.features == "cached" and s.step != "lbfgs":  # it is faster
            training = learning.HeadsTogether(*arguments, most_bytes=MOST_BYTES, **how)
        else:
            kind = learning.HeadsTogether if s.together is True else learning.HeadOnly
            training = kind(*arguments, **how)
        return Algorithms(training, evaluation, backbone, initial)
    learner = learn(nn.Sequential(backbone, head))
    if s.anneal is not None:
        training = learning.MultiStepLoss(learner, s.steps, loss, s.anneal)
    else:
        whole = learning.ReptileNetwork if s.name == "reptile" else learning.WholeNetwork
        training = whole(learner, s.steps, loss)
    evaluation = learning.WholeNetwork(learner, test_steps, loss)
    if s.test_scope == "head":
        evaluation = learning.HeadOnly(backbone, learn(head), test_steps, loss, together=False)
    return Algorithms(training, evaluation, backbone, head)


def _learner(s: AlgorithmSettings) -> Callable[[nn.Module], Any]:
    """From a module to a learner of it; scalars that are meta-learned are shared by all."""
    lr: Any = ANY_STEP_SIZE if s.lr == "auto" else s.lr
    if s.learn_lr:
        lr = nn.Parameter(torch.tensor(lr))
    if "implicit" in table.ALGORITHMS[s.name][0]:
        l2: Any = nn.Parameter(torch.tensor(float(s.l2))) if s.learn_l2 else s.l2
        cls = implicit.ImplicitCGHead if s.scope == "head" else implicit.ImplicitMAML
        chosen: dict[str, Any] = {"inner": _inner(s), "linear": _linear(s)}
        chosen["accuracy"] = s.accuracy or None
        if s.curvature is not None:
            hessian = s.curvature == "hessian"
            chosen["curvature"] = implicit.Hessian() if hessian else implicit.GaussNewton()
        return lambda module: cls(module, lr, l2=l2, **chosen)
    first_order = s.name in ("fo_anil", "fomaml")
    if s.name == "reptile":
        return lambda module: Reptile(module, lr, optimizer=s.optimizer)
    if s.engine == "learn2learn":
        return lambda module: Learn2LearnMAML(module, lr, first_order=first_order)
    rest = {"first_order": first_order, "learn_init": s.name != "itd_bio",
            "optimizer": s.optimizer}  # fmt: skip
    if s.name == "meta_sgd":
        return lambda module: UnrolledMAML(
            module, nn.ParameterList(torch.full_like(p, lr) for p in module.parameters()), **rest
        )
    return lambda module: UnrolledMAML(module, lr, **rest)


def _inner(s: AlgorithmSettings) -> implicit.InnerSolver:
    """Newton and L-BFGS go on until their error is small beside the linear solver's."""
    if s.step == "newton":
        return implicit.Newton(cg_steps=s.cg_steps, tol=0.1 * s.cg_tol)
    if s.step == "lbfgs":
        return implicit.LBFGS(tol=0.1 * s.cg_tol)
    return implicit.GradientDescent(adaptive=s.lr == "auto")


def _linear(s: AlgorithmSettings) -> implicit.LinearSolver:
    if s.solver == "direct":
        return implicit.Direct(damping=s.damping)
    if s.solver == "nystrom":
        return implicit.Nystrom(rank=s.cg_steps, damping=s.damping)
    if s.solver == "identity":  # the derivative of one gradient step
        return implicit.Identity(ANY_STEP_SIZE if s.lr == "auto" else s.lr, damping=s.damping)
    if s.solver == "neumann":
        return implicit.Neumann(steps=s.cg_steps, tol=s.cg_tol, damping=s.damping)
    kinds = {"jacobi": implicit.Jacobi, "nystrom": implicit.Nystrom,
             "kronecker": implicit.Kronecker}  # fmt: skip
    kind = kinds.get(str(s.preconditioner))
    return implicit.CG(s.cg_steps, s.cg_tol, s.damping, kind and kind(), s.truncated)
