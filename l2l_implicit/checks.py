"""One clear line for each kind of bad input: what was expected, what came, what to do."""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class NotFinite(FloatingPointError, ValueError):
    """A loss that is nan or infinite: a wrong input, or an inner loop that diverges."""


SOLVERS = ("cg", "neumann", "direct")
STEPS = ("newton", "gradient", "lbfgs")


def settings(
    model: Any, lr: Any, l2: Any, anchor: Any, cg_steps: Any, cg_tol: Any, step: Any, inner_tol: Any
) -> None:
    """What every implicit learner's constructor is given, its defaults elsewhere."""
    model_and_lr(model, lr, first_order=False)
    coefficient(l2)
    choice("anchor", anchor, ("zero", "init"))
    inner_solver(step, None, inner_tol)
    linear_solver("cg", cg_steps, cg_tol, None, 0.0)


def model_and_lr(model: Any, lr: Any, first_order: bool) -> None:
    """The constructor's first arguments, which learn2learn has too."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {model!r}; wrap it in one")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(
            f"model: expected the module itself, got a {type(model).__name__}, which copies and "
            "averages behind the learner's back; wrap the backbone, or share the tasks out with "
            "l2l_implicit.distributed"
        )
    if isinstance(lr, Tensor) and lr.requires_grad:
        raise TypeError(
            "lr: expected a number, got a tensor that requires grad; the solution of the inner "
            "problem does not depend on lr, so it cannot be meta-learned here: pass float(lr)"
        )
    if not isinstance(lr, str):
        positive("lr", lr)
    elif lr != "auto":
        raise TypeError(f"lr: expected a number or 'auto', got {lr!r}; pass a float")
    elif first_order:
        raise ValueError(
            "lr: expected a number with first_order=True, which knows no curvature, got 'auto'; "
            "pass a float"
        )


def inner_solver(step: Any, stop_tol: Any, inner_tol: Any) -> None:
    """How the inner problem is solved, and when it counts as solved."""
    if isinstance(step, str) or not callable(step):
        choice("step", step, STEPS)
    else:
        makes_a_step(step)
    if stop_tol is not None:
        positive("stop_tol", stop_tol)
    positive("inner_tol", inner_tol)


def linear_solver(
    solver: Any, cg_steps: Any, cg_tol: Any, neumann_alpha: Any, damping: Any
) -> None:
    """How the linear system is solved."""
    choice("solver", solver, SOLVERS)
    count("cg_steps (N)", cg_steps)
    positive("cg_tol", cg_tol)
    if neumann_alpha is not None:
        positive("neumann_alpha", neumann_alpha)
    if number("damping", damping) < 0:
        raise ValueError(
            f"damping: expected a number of at least 0, got {damping}; it is added to the diagonal"
        )


def makes_a_step(step: Callable[..., Any]) -> bool:
    """Whether ``step`` is a factory, called once a task, or else the step itself."""
    try:
        signature = inspect.signature(step)
    except ValueError:  # a callable written in C does not say
        return False
    for arguments, factory in (((), True), ((None,), False)):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return factory
    raise TypeError(
        f"step: expected a factory without arguments or a callable of one linearization, got "
        f"{step!r} with the arguments {signature}; wrap it in functools.partial"
    )


def number(name: str, value: Any) -> float:
    """``value`` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real | Tensor):
        raise TypeError(f"{name}: expected a number, got {value!r}; pass a float")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name}: expected one number, got a tensor of shape {tuple(value.shape)}; "
            "override regularizer() for a coefficient per parameter"
        )
    value = float(value.detach()) if isinstance(value, Tensor) else float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}; check where it came from")
    return value


def positive(name: str, value: Any) -> None:
    """A finite number above 0."""
    if number(name, value) <= 0:
        raise ValueError(f"{name}: expected a number above 0, got {value}; try 0.1")


def coefficient(l2: Any) -> None:
    """The regulariser's strength: a finite number, at least 0."""
    if number("l2", l2) < 0:
        raise ValueError(
            f"l2: expected a number of at least 0, got {float(l2)}; a negative one makes the inner "
            "problem unbounded: clamp it, or learn its logarithm by overriding regularizer()"
        )


def count(name: str, value: Any) -> None:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected a whole number, got {value!r}; pass an int")
    if int(value) < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}; try 20")


def choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """One of a few names; an unknown one is answered with the nearest."""
    allowed = list(allowed)
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}?" if near else f"choose {allowed[0]!r}"
    expected = ", ".join(map(repr, allowed))
    raise ValueError(f"{name}: expected one of {expected}, got {value!r}; {hint}")


def steps(loss: Any, number_of_steps: Any) -> None:
    """Whether ``adapt`` got a tensor alone or a closure with its number of steps."""
    if isinstance(loss, Tensor):
        if number_of_steps is not None:
            raise ValueError(
                "steps: expected with a closure only, got a loss tensor; call adapt(loss) once a "
                "step, or adapt(lambda: loss_fn(learner(x), y), steps=K)"
            )
    elif not callable(loss):
        raise TypeError(f"loss: expected a tensor or a closure, got {type(loss).__name__}")
    elif number_of_steps is not None:
        count("steps (K)", number_of_steps)


def gradients_possible() -> None:
    """Adapting differentiates, which inference mode forbids whatever comes after it."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "adapt: expected a mode in which gradients can be enabled, got torch.inference_mode(); "
            "use torch.no_grad(), and adapt(closure, steps=K)"
        )


def inner_parameters(module: nn.Module, allow_nograd: bool) -> list[Tensor]:
    """Phi: the module's parameters that are to be adapted."""
    parameters = list(module.parameters())
    phi: list[Tensor] = [p for p in parameters if p.requires_grad]
    if len(phi) < len(parameters) and not allow_nograd:
        frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        raise ValueError(
            f"expected parameters that require grad, got {', '.join(frozen)} without; call "
            "requires_grad_() on them, or pass allow_nograd=True to leave them as they are"
        )
    if not phi:
        raise ValueError(
            "expected a module with parameters that require grad, got none to adapt; freeze fewer"
        )
    if len({(p.dtype, p.device) for p in phi}) > 1:
        kinds = ", ".join(sorted({f"{p.dtype} on {p.device}" for p in phi}))
        raise ValueError(f"expected parameters of one dtype and device, got {kinds}; move them")
    return phi


def loss(value: Any) -> Tensor:
    """The inner loss: a finite scalar with a graph."""
    if not isinstance(value, Tensor):
        raise TypeError(f"loss: expected a tensor, got {type(value).__name__} from the closure")
    if value.numel() != 1:
        raise ValueError(
            f"loss: expected a scalar, got shape {tuple(value.shape)}; reduce it, e.g. .mean()"
        )
    if not value.requires_grad:
        raise ValueError(
            "loss: expected one that depends on the learner's parameters, got one without a graph; "
            "compute it from learner(x) with gradients enabled, or pass a closure to adapt()"
        )
    if not math.isfinite(value.item()):
        raise NotFinite(
            f"loss: expected a finite number, got {float(value.detach())}; look for nan in the "
            "data, or an inner step that diverges: smaller lr, or step='newton'"
        )
    return value


def used(gradients: Sequence[Tensor | None], allow_unused: bool) -> None:
    """Whether the loss depends on the parameters: on all, or at least on some."""
    absent = sum(gradient is None for gradient in gradients)
    if absent == len(gradients):
        raise ValueError(
            "loss: expected one that depends on the learner's parameters, got one that depends on "
            "none of them; compute it from learner(x)"
        )
    if absent and not allow_unused:
        raise ValueError(
            f"loss: expected one that depends on all {len(gradients)} parameters, got one that "
            f"{absent} of them do not enter; pass allow_unused=True"
        )


def finite_products(products: Iterable[Tensor | None]) -> None:
    """Whether the mixed products are: they may overflow where the system's solution does not."""
    for product in products:
        if product is not None and not math.isfinite(float(product.detach().sum())):
            raise FloatingPointError(
                "hypergradient: expected finite products, got nan or infinity in the mixed "
                "derivative; scale the features down, or raise l2"
            )
