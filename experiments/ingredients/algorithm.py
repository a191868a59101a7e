"""The algorithm: one object behind learn2learn's ``clone`` and ``adapt``."""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from experiments.ingredients.algorithm_table import (
    ALGORITHMS,
    LEARNED_INITIAL_HEAD,
    VARIANTS,
    settings_of,
)
from experiments.ingredients.solvers import solvers, step_size
from experiments.tracking import TrackedIngredient, UserError
from experiments.training.algorithms import (
    Algorithm,
    HeadOnly,
    HeadsTogether,
    Loss,
    ReptileNetwork,
    WholeNetwork,
)
from l2l_implicit import ImplicitCGHead, ImplicitMAML, checks
from l2l_implicit.baselines import Learn2LearnMAML, Reptile, UnrolledMAML

algorithm = TrackedIngredient("algorithm")
MOST_BYTES = 2**30  # of the tasks' graphs that together=auto keeps on a CPU
TYPES = {
    "variant": str | None,
    "lr": float | str,
    "test_steps": int | None,
    "test_scope": str | None,
    "scope": str | None,
    "l2": float | None,
    "step": str | None,
    "solver": str | None,
    "cg_steps": int | None,
    "cg_tol": float | None,
    "damping": float | None,
    "features": str | None,
    "engine": str | None,
    "optimizer": str | None,
    "learn_lr": bool | None,
    "learn_l2": bool | None,
    "together": bool | str | None,
}


@algorithm.config
def defaults() -> None:
    name = "rm_metal"  # one of experiments.ingredients.algorithm_table
    variant = None  # rm_metal: None (the learner's own defaults), paper or as_released
    _own = settings_of(name, variant)
    scope = _own["scope"]  # what is adapted: head or network
    lr = _own["lr"]  # inner step size; auto: from the largest curvature (step=gradient)
    steps = _own["steps"]  # the most inner steps K
    test_steps = None  # inner steps in validation and test; None: as in training
    test_scope = None  # head: a network's head alone is adapted in validation and test
    l2 = _own["l2"]  # inner regulariser
    step = _own["step"]  # inner solver: newton, lbfgs or gradient
    solver = _own["solver"]  # linear solver: cg, neumann or direct
    cg_steps = _own["cg_steps"]  # the most steps N of the linear solver
    cg_tol = _own["cg_tol"]  # relative residual at which the linear solver stops
    damping = _own["damping"]  # added to the diagonal of the linear system
    features = _own["features"]  # cached (once a task) or as_published (at every inner step)
    engine = _own["engine"]  # of unrolled differentiation: higher or learn2learn
    optimizer = _own["optimizer"]  # inner: sgd, adam or rmsprop
    learn_lr = _own["learn_lr"]  # meta-learn the inner step size
    learn_l2 = _own["learn_l2"]  # meta-learn the regulariser
    together = _own["together"]  # the heads of all tasks of a batch at once; auto: see docs/cost.md
    batch_norm = _own["batch_norm"]  # support and query: together, separately or eval


class Algorithms(NamedTuple):
    """One algorithm, as it is trained and as it is evaluated, and the modules that it trains."""

    training: Algorithm
    evaluation: Algorithm
    backbone: nn.Module
    head: nn.Module


def make_algorithms(
    settings: Mapping[str, Any], backbone: nn.Module, width: int, outputs: int,
    test_outputs: int, loss: Loss, device: torch.device,
) -> Algorithms:  # fmt: skip
    """The configured algorithm on a backbone and a linear head.

    Args:
        settings: the configuration of this ingredient.
        backbone: inputs to ``width`` features.
        outputs, test_outputs: of the head, in training and in evaluation.
        loss: of predictions and targets: the mean cross-entropy or squared error.
        device: where the head is to be; the backbone is there.

    Raises:
        UserError: what the algorithm cannot do, in one line.
    """
    _check(settings)
    head = nn.Linear(width, outputs).to(device)
    try:
        return _build(settings, backbone, head, test_outputs, loss)
    except (ValueError, TypeError) as error:
        raise UserError(f"algorithm.{error}") from error


def _build(
    s: Mapping[str, Any], backbone: nn.Module, head: nn.Linear, test_outputs: int, loss: Loss
) -> Algorithms:
    learn, test_steps, initial = _learner(s), s["test_steps"] or s["steps"], head
    if s["batch_norm"] == "eval":
        _freeze_statistics(backbone)
    if s["scope"] == "head":
        how = {"together": s["batch_norm"] == "together", "cached": s["features"] == "cached"}
        arguments = (backbone, learn(head), s["steps"], loss)
        training: Algorithm = HeadOnly(*arguments, **how)
        if _together(s):
            most = MOST_BYTES if s["together"] == "auto" else math.inf
            training = HeadsTogether(*arguments, **how, most_bytes=most)
        if test_outputs != head.out_features:
            if s["name"] in LEARNED_INITIAL_HEAD:
                raise ValueError(_other_ways(s["name"], head.out_features, test_outputs))
            head = nn.Linear(head.in_features, test_outputs).to(head.weight.device)
        evaluation: Algorithm = HeadOnly(backbone, learn(head), test_steps, loss, **how)
        return Algorithms(training, evaluation, backbone, initial)
    if test_outputs != head.out_features:
        raise ValueError(_other_ways(s["name"], head.out_features, test_outputs))
    learner = learn(nn.Sequential(backbone, head))
    whole = ReptileNetwork if s["name"] == "reptile" else WholeNetwork
    training = whole(learner, s["steps"], loss)
    evaluation = WholeNetwork(learner, test_steps, loss)
    if s["test_scope"] == "head":
        evaluation = HeadOnly(backbone, learn(head), test_steps, loss, together=False)
    return Algorithms(training, evaluation, backbone, head)


def _together(s: Mapping[str, Any]) -> bool:
    """Whether the heads of a batch are learnt together: by default where that is faster."""
    if s["together"] == "auto":
        return s["features"] == "cached" and s["step"] != "lbfgs"
    return bool(s["together"])


def _other_ways(name: str, trained: int, tested: int) -> str:
    return (
        f"name={name}: expected test_ways={trained} as in training, got {tested}; the initial "
        "head is meta-learned and has that many outputs: use rm_metal or itd_bio, or equal ways"
    )


def _learner(s: Mapping[str, Any]) -> Callable[[nn.Module], Any]:
    """From a module to a learner of it; scalars that are meta-learned are shared by all."""
    name, lr = s["name"], s["lr"]
    if s["learn_lr"]:
        lr = nn.Parameter(torch.tensor(checks.number("lr", lr)))
    if name in ("rm_metal", "imaml_gd", "imaml_hf"):
        l2: Any = nn.Parameter(torch.tensor(float(s["l2"]))) if s["learn_l2"] else s["l2"]
        keys = ("step", "lr", "solver", "cg_steps", "cg_tol", "damping")
        found = solvers(**{key: s[key] for key in keys})
        cls = ImplicitCGHead if name == "rm_metal" else ImplicitMAML
        return lambda module: cls(module, step_size(lr), l2=l2, **found)
    first_order = name in ("fo_anil", "fomaml")
    if name == "reptile":
        return lambda module: Reptile(module, lr, optimizer=s["optimizer"])
    if s["engine"] == "learn2learn":
        return lambda module: Learn2LearnMAML(module, lr, first_order=first_order)
    return lambda module: UnrolledMAML(
        module, lr, first_order=first_order, learn_init=name != "itd_bio", optimizer=s["optimizer"]
    )


def _freeze_statistics(backbone: nn.Module) -> None:
    """Batch normalisation by running statistics, from now on."""
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _check(s: Mapping[str, Any]) -> None:
    """Raise UserError for settings that do not fit together."""
    name = s["name"]
    try:
        checks.choice("name", name, ALGORITHMS)
        own = settings_of(name, s["variant"])
        for key, default in own.items():
            if default is None and s.get(key) is not None:
                raise ValueError(f"{key}: expected no such setting for {name}, got {s[key]!r}; "
                                 "leave it out")
        checks.count("steps (K)", s["steps"])
        if s["test_steps"] is not None:
            checks.count("test_steps", s["test_steps"])
        _check_choices(s)
        _check_combinations(s)
    except (ValueError, TypeError) as error:
        raise UserError(f"algorithm.{error}") from error


def _check_choices(s: Mapping[str, Any]) -> None:
    choices: dict[str, Iterable[Any]] = {
        "scope": ("head", "network"),
        "test_scope": ("head",),
        "features": ("cached", "as_published"),
        "engine": ("higher", "learn2learn"),
        "batch_norm": ("together", "separately", "eval"),
        "together": ("auto", True, False),
        "variant": VARIANTS,
    }
    for key, allowed in choices.items():
        if s[key] is not None:
            checks.choice(key, s[key], allowed)


def _check_combinations(s: Mapping[str, Any]) -> None:
    name = s["name"]
    if s["together"] is True and s["features"] == "as_published":
        raise ValueError(
            "together: expected False with features='as_published', got True; the backbone cannot "
            "run again at every inner step of all tasks at once"
        )
    if s["variant"] is not None and name != "rm_metal":
        raise ValueError(f"variant: expected none for {name}, got {s['variant']!r}; leave it out")
    if s["scope"] != settings_of(name, None)["scope"] and name != "unrolled":
        raise ValueError(
            f"scope: expected {settings_of(name, None)['scope']!r} for {name}, got "
            f"{s['scope']!r}; use unrolled, or an algorithm of that scope"
        )
    if s["scope"] == "network" and s["batch_norm"] == "together":
        raise ValueError(
            f"batch_norm: expected separately or eval for {name}, got 'together'; a network that "
            "is adapted sees the query set only after the inner loop"
        )
    if s["engine"] == "learn2learn":
        if name in ("itd_bio", "unrolled") or s["optimizer"] != "sgd" or s["learn_lr"]:
            raise ValueError(
                f"engine: expected higher for {name} with optimizer={s['optimizer']}, "
                f"learn_lr={s['learn_lr']}, got 'learn2learn', whose MAML has none of these; "
                "use engine=higher"
            )
