"""One clear line for each kind of bad input: what was expected, what came, what to do."""

import difflib
import math
import numbers
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from learn2learn.algorithms import MAML
from torch import Tensor, nn
from torch.autograd import forward_ad


class NotFinite(FloatingPointError, ValueError):
    """A loss that is nan or infinite: a wrong input, or an inner loop that diverges."""


# Keywords of earlier versions, and where each went.
_RENAMED = {
    "step": "inner=Newton(), GradientDescent() or LBFGS()",
    "solver": "linear=CG(), Neumann() or Direct()",
    "cg_steps": "linear=CG(steps=...), and inner=Newton(cg_steps=...)",
    "cg_tol": "linear=CG(tol=...)",
    "neumann_alpha": "linear=Neumann(step_size=...)",
    "damping": "linear=CG(damping=...)",
    "inner_tol": "max_error=...",
    "stop_tol": "the inner solver's tol, e.g. inner=Newton(tol=...)",
}


def keywords(name: str, unknown: Iterable[str]) -> None:
    """No keyword that the learner does not have; one of an earlier version names the new one."""
    for key in unknown:
        renamed(key)
        own = [name for name in SETTINGS if name not in _MAML]
        near = difflib.get_close_matches(key, own, n=1)
        hint = f"did you mean {near[0]}?" if near else "leave it out"
        expected = ", ".join(own)
        raise TypeError(f"{name}: expected keywords among {expected}, got {key!r}; {hint}")


def renamed(key: str) -> None:
    """No keyword of an earlier version."""
    if key in _RENAMED:
        raise TypeError(f"{key}: expected {_RENAMED[key]}, got the keyword of an earlier version")


WRAPPED = (
    "{}: expected a backbone, or a module whose forward() does the whole task, got a {}, whose "
    "clone() and adapt() it would not see; use a process for each GPU, and Ranks.average of "
    "l2l_implicit.distributed"
)


def model(value: Any) -> None:
    """The module that a learner adapts."""
    runs_as_it_is(value)
    if isinstance(value, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(
            f"model: expected the module itself, got a {type(value).__name__}, which copies and "
            "averages behind the learner's back; wrap the backbone, or share the tasks out with "
            "l2l_implicit.distributed"
        )
    if any(p.is_complex() for p in value.parameters()):
        raise TypeError(
            "model: expected real parameters, got complex ones; keep the real and imaginary parts "
            "as one real tensor, and use torch.view_as_complex in forward()"
        )


def step_size(lr: Any) -> None:
    """A learner's ``lr``."""
    if isinstance(lr, Tensor) and lr.requires_grad:
        raise TypeError(
            "lr: expected a number, got a tensor that requires grad; the solution of the inner "
            "problem does not depend on lr, so it cannot be meta-learned here: pass float(lr)"
        )
    if isinstance(lr, str):
        raise TypeError(
            f"lr: expected a number, got {lr!r}; pass a float, and for a step size of 1 over the "
            "largest curvature inner=GradientDescent(adaptive=True)"
        )
    positive("lr", lr)


def runs_as_it_is(model: Any) -> None:
    """A module whose parameters are there, and which runs on those of a task in their place."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {model!r}; wrap it in one")
    if any(map(nn.parameter.is_lazy, [*model.parameters(), *model.buffers()])):
        raise ValueError(
            "model: expected initialised parameters, got those of a lazy module, which have no "
            "shape yet; run one batch through it first"
        )
    for name, part in model.named_modules():
        kinds = {kind.__name__ for kind in type(part).__mro__}
        compiled = kinds & {"OptimizedModule", "ScriptModule", "GraphModule"}
        if compiled or part._compiled_call_impl is not None:
            what = printable(name) if name else "the whole"
            raise TypeError(
                f"model: expected modules that are not compiled, got {what} by torch.compile, "
                "torch.jit or torch.fx, which does not run on a task's parameters; compile the "
                "backbone, and pass what is adapted as it was (compiled._orig_mod)"
            )


def hidden_names(learner: nn.Module, model: nn.Module) -> None:
    """Whether ``learner.NAME`` is the learner's own where learn2learn's MAML gives the model's."""
    names = {*model._modules, *model._parameters, *model._buffers}
    own = {name for name in names if name in learner.__dict__ or hasattr(type(learner), name)}
    hidden = sorted(name for name in own if not hasattr(MAML, name) and name not in _MAML)
    if hidden:
        first = printable(hidden[0])
        warnings.warn(
            f"expected a model without parts called {', '.join(map(printable, hidden))}, which are "
            f"the learner's own: learner.{first} is not the model's; use learner.module.{first}",
            stacklevel=3,
        )


_MAML = ("module", "lr", "first_order", "allow_unused", "allow_nograd")


def number(name: str, value: Any) -> float:
    """``value`` as a finite float."""
    odd = isinstance(value, Tensor) and (value.is_complex() or value.dtype is torch.bool)
    if odd or isinstance(value, bool) or not isinstance(value, numbers.Real | Tensor):
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


def step_sizes(lrs: Iterable[Any], parameters: Sequence[Tensor]) -> None:
    """A tensor for each parameter: a scalar, or of its shape."""
    got = [tuple(lr.shape) if isinstance(lr, Tensor) else lr for lr in lrs]
    fit = [((), tuple(p.shape)) for p in parameters]
    if len(got) != len(fit) or any(g not in f for g, f in zip(got, fit, strict=True)):
        raise ValueError(
            f"lr: expected {len(fit)} tensors, of the parameters' shapes or scalars, got {got}; "
            "try [torch.full_like(p, 0.1) for p in model.parameters()]"
        )


def not_negative(name: str, value: Any, do: str = "try 0") -> None:
    """A finite number of at least 0."""
    if number(name, value) < 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {float(value)}; {do}")


def flag(name: str, value: Any) -> None:
    """True or False, numpy's too, or 1 or 0."""
    if not (type(value).__name__.startswith("bool") or isinstance(value, int) and value in (0, 1)):
        raise TypeError(f"{name}: expected True or False, got {value!r}; pass a bool")


def flags(
    learner: Any, first_order: Any, allow_unused: Any, allow_nograd: Any
) -> dict[str, bool]:
    """learn2learn's three, in this order: what is given, or for None the learner's own."""
    found = dict(first_order=first_order, allow_unused=allow_unused, allow_nograd=allow_nograd)
    for name, value in found.items():
        found[name] = value = getattr(learner, name) if value is None else value
        if type(value) is not bool:
            flag(name, value)
    return found


def coefficient(l2: Any) -> None:
    """The regulariser's strength: a finite number, at least 0."""
    do = "clamp it, or learn its logarithm by overriding regularizer()"
    not_negative("l2", l2, f"a negative one makes the inner problem unbounded: {do}")


def has_method(name: str, examples: str, signature: str, value: Any) -> None:
    """An object, not a class, with a method of this signature, or in its place `Perturbed`'s."""
    method = getattr(value, signature.split("(")[0], None)
    other = name == "linear" and hasattr(value, "respond")
    if isinstance(value, type) or not (callable(method) or other):
        raise TypeError(
            f"{name}: expected {examples}, got {value!r}; call the class, or pass an object with a "
            f"method {signature}"
        )


def rows(features: Any, images: int) -> None:
    """A tensor with a row of features for each image."""
    if not isinstance(features, Tensor):
        raise TypeError(
            f"backbone: expected a tensor of features, got {type(features).__name__}; return one"
        )
    if features.dim() == 0 or len(features) != images:
        raise ValueError(
            f"backbone: expected one row of features for each of {images} images, got shape "
            f"{tuple(features.shape)}; do not reduce over the batch"
        )


def count(name: str, value: Any) -> None:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected a whole number, got {value!r}; pass an int")
    if int(value) < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}; try 20")


def printable(text: object) -> str:
    r"""A name from outside, on one line: what is no printable character as text (``\x1b``)."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """One of a few names; an unknown one is answered with the nearest."""
    allowed = list(allowed)
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}?" if near else f"choose {allowed[0]!r}"
    expected = ", ".join(map(repr, allowed))
    raise ValueError(f"{name}: expected one of {expected}, got {value!r}; {hint}")


def no_transform() -> None:
    """No transform of functorch, within which nothing can be made a leaf, and no forward mode."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(
            "adapt: expected no torch.func transform or forward mode around it, got one; use "
            "torch.autograd.grad, and adapt_together for several tasks"
        )


def adapt(loss: Any, steps: Any) -> None:
    """What ``adapt`` got: a tensor alone, or a closure with its number of steps."""
    no_transform()
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "adapt: expected a mode in which gradients can be enabled, got torch.inference_mode(); "
            "use torch.no_grad(), and adapt(closure, steps=K)"
        )
    if isinstance(loss, Tensor):
        if steps is not None:
            raise ValueError(
                "steps: expected with a closure only, got a loss tensor; call adapt(loss) once a "
                "step, or adapt(lambda: loss_fn(learner(x), y), steps=K)"
            )
    elif not callable(loss):
        raise TypeError(f"loss: expected a tensor or a closure, got {type(loss).__name__}")
    elif steps is None:
        raise ValueError(
            "steps: expected the number K of inner steps with a closure, got none; call "
            "adapt(closure, steps=20)"
        )
    elif not (type(steps) is int and steps >= 1):
        count("steps (K)", steps)


def inner_parameters(module: nn.Module, allow_nograd: bool) -> list[Tensor]:
    """Phi: the module's parameters that are to be adapted."""
    parameters = list(module.parameters())
    phi: list[Tensor] = [*filter(_REQUIRES_GRAD, parameters)]
    if len(phi) < len(parameters) and not allow_nograd:
        frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
        raise ValueError(
            f"expected parameters that require grad, got {', '.join(frozen[:3])}{more} without; "
            "call requires_grad_() on them, or pass allow_nograd=True to leave them as they are"
        )
    if not phi:
        raise ValueError(
            "expected a module with parameters that require grad, got none to adapt; freeze fewer"
        )
    if phi[0].is_inference():
        raise RuntimeError(
            "expected clone() outside of torch.inference_mode(), got parameters that were made in "
            "it, which have no gradient; use torch.no_grad()"
        )
    if len(set(map(_KIND, phi))) > 1:
        kinds = ", ".join(sorted({f"{p.dtype} on {p.device}" for p in phi}))
        raise ValueError(f"expected parameters of one dtype and device, got {kinds}; move them")
    return phi


_REQUIRES_GRAD = operator.attrgetter("requires_grad")
_KIND = operator.attrgetter("dtype", "device")


def anchor(given: Any, phi: Sequence[Tensor], *tasks: int) -> list[Tensor]:
    """A task's own anchor: a tensor for each of phi; of several tasks, with one more dimension."""
    tensors = list(given) if isinstance(given, tuple | list) else [given]
    shapes, device = [(*tasks, *p.shape) for p in phi], phi[0].device
    fit = [isinstance(a, Tensor) and a.is_floating_point() and a.device == device for a in tensors]
    if not all(fit) or [tuple(a.shape) for a in tensors] != shapes:
        got = [(*a.shape, a.dtype) if isinstance(a, Tensor) else type(a).__name__ for a in tensors]
        raise ValueError(
            f"anchor: expected floats of the adapted parameters' shapes {shapes} on {device}, got "
            f"{got}; give a tensor for each of them, in their order"
        )
    return tensors


def like(name: str, value: Any, other: Tensor) -> Tensor:
    """What a solver of one's own has returned: a tensor like another."""
    got = (value.dtype, *value.shape) if isinstance(value, Tensor) else type(value).__name__
    if got != (expected := (other.dtype, *other.shape)):
        help_ = "see the protocols InnerSolver and LinearSolver"
        raise TypeError(f"{name}: expected a tensor of {expected}, got {got}; {help_}")
    return value


def loss(value: Any) -> Tensor:
    """The inner loss: a finite scalar with a graph."""
    if not isinstance(value, Tensor):
        raise TypeError(f"loss: expected a tensor, got {type(value).__name__} from the closure")
    if value.numel() != 1 or value.is_complex():
        got = f"shape {tuple(value.shape)}, {value.dtype}"
        raise ValueError(f"loss: expected a scalar, got {got}; reduce it, e.g. .mean(), or .real")
    if not value.requires_grad:
        raise ValueError(
            "loss: expected one that depends on the learner's parameters, got one without a graph; "
            "compute it from learner(x) with gradients enabled, or pass a closure to adapt()"
        )
    if not math.isfinite(value.item()):
        raise NotFinite(
            f"loss: expected a finite number, got {float(value.detach())}; look for nan, an empty "
            "support set, or an inner step that diverges: smaller lr, or inner=Newton()"
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


def dense(gradients: Iterable[Tensor | None]) -> None:
    """Gradients that make one vector."""
    if any(gradient is not None and gradient.is_sparse for gradient in gradients):
        raise TypeError(
            "loss: expected dense gradients of the parameters, got a sparse one, as of "
            "nn.Embedding(sparse=True); use sparse=False for what is adapted"
        )


def finite_products(products: Iterable[Tensor | None]) -> bool:
    """Whether the mixed products are: they may overflow where the system's solution does not.

    Returns:
        Whether there is one at all.
    """
    some = False
    for product in products:
        if product is not None:
            some = True
            if not math.isfinite(float(product.detach().sum())):
                raise FloatingPointError(
                    "hypergradient: expected finite products, got nan or infinity in the mixed "
                    "derivative; scale the features down, or raise l2"
                )
    return some


def finite_solutions(point: Tensor) -> None:
    """Whether every task's inner problem ended at finite parameters, ``[T, n]``."""
    # One number is soon read.
    if not math.isfinite(float(point.sum())) and not (finite := point.sum(1).isfinite()).all():
        tasks = (~finite).nonzero().flatten().tolist()
        where = f" in tasks {tasks}" if len(point) > 1 else ""
        raise FloatingPointError(
            f"inner problem: expected finite parameters, got nan or infinity{where}; look for nan "
            "in the features, scale them down, or raise l2"
        )


def _anchor_name(value: Any) -> None:
    if isinstance(value, Tensor | list | tuple):
        got, own = type(value).__name__, "give a task its own by clone(anchor=...)"
        raise TypeError(f"anchor: expected 'zero' or 'init', got {got}; {own}")
    choice("anchor", value, ("zero", "init"))


def head_loss(value: Any) -> None:
    """One of torch's two losses that a linear head has in closed form."""
    if value is None:
        return
    forward = getattr(type(value), "forward", None)
    plain = forward is nn.MSELoss.forward or (
        forward is nn.CrossEntropyLoss.forward
        and value.weight is None
        and value.label_smoothing == 0.0
        and value.ignore_index < 0
    )
    if not plain or value.reduction not in ("mean", "sum"):
        raise ValueError(
            "loss: expected nn.CrossEntropyLoss (no weights, no smoothing, no ignored class) or "
            f"nn.MSELoss with reduction mean or sum, got {value!r}; adapt(closure) takes any loss"
        )


def override(name: str, value: Any) -> None:
    """A function in place of one learner's method, behind which a module would be hidden."""
    if isinstance(value, nn.Module) or not callable(value):
        raise TypeError(
            f"{name}: expected a function, got a {type(value).__name__}; keep a module under "
            f"another name, and call it in the function or in a subclass's {name}()"
        )


SETTINGS: dict[str, Callable[[Any], object]] = {
    "module": model, "lr": step_size, "l2": coefficient, "anchor": _anchor_name,
    "inner": partial(has_method, "inner", "an inner solver such as Newton()", "begin(lr)"),
    "linear": partial(has_method, "linear", "a linear solver such as CG() or Direct()",
                      "solve(hvp, b, start)"),
    "curvature": partial(has_method, "curvature", "Hessian() or GaussNewton()",
                         "linearize(loss, parameters, **options)"),
    "loss": head_loss,
    "accuracy": lambda a: a is None or positive("accuracy", a),  # type: ignore[func-returns-value]
    "max_error": partial(positive, "max_error"),
    **{name: partial(flag, name)
       for name in ("warm_start", "first_order", "allow_unused", "allow_nograd")},
    **{name: partial(override, name) for name in ("regularizer", "inner_step", "linear_solve")},
}  # fmt: skip

# Many tasks at once.


def can_be_together(learner: Any) -> None:
    """A learner whose every setting serves T linear heads at once."""
    no_transform()
    if type(learner.module) is not nn.Linear:
        raise TypeError(
            "adapt_together: expected a learner of a torch.nn.Linear, got one of "
            f"{type(learner.module).__name__}; adapt one task at a time"
        )
    head, own = learner.module, type(learner).forward.__qualname__ != "ImplicitCGHead.forward"
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    alone = {
        "first_order=True": learner.first_order,
        "warm_start=True": learner.warm_start,
        "a regularizer of its own": not learner._plain("regularizer"),
        "frozen parameters": learner.allow_nograd
        and not all(p.requires_grad for p in head.parameters()),
        "hooks (weight_norm, pruning)": any(getattr(m, h) for m in (learner, head) for h in hooks),
        "a forward() of its own": own or "forward" in {**vars(head), **vars(learner)},
    }
    for name, used in alone.items():
        if used:
            raise ValueError(
                f"adapt_together: expected settings that serve several tasks, got {name}; adapt "
                "one task at a time"
            )


def support(features: Any, targets: Any, head: nn.Linear, squared: bool) -> None:
    """Support sets of T tasks for ``head``."""
    d, k = head.in_features, head.out_features
    if not isinstance(features, Tensor) or not isinstance(targets, Tensor):
        raise TypeError(
            f"features, targets: expected tensors, got {type(features).__name__}, "
            f"{type(targets).__name__}; stack the tasks"
        )
    if features.dim() != 3 or features.shape[2] != d or not len(features):
        raise ValueError(
            f"features: expected shape [T, m, {d}], got {list(features.shape)}; "
            "view the backbone's output as (tasks, images, features)"
        )
    if not features.is_floating_point():
        raise TypeError(f"features: expected floats, got {features.dtype}; convert them")
    if features.device != head.weight.device or targets.device != features.device:
        raise ValueError(
            f"expected one device, got features on {features.device}, targets on "
            f"{targets.device}, the head on {head.weight.device}; move them"
        )
    examples = list(features.shape[:2])
    if squared:
        fits = ([*examples, k], *([examples] if k == 1 else []))
        if not targets.is_floating_point() or list(targets.shape) not in fits:
            raise ValueError(
                f"targets: expected floats of shape {[*examples, k]}, got {targets.dtype} of shape "
                f"{list(targets.shape)}; reshape them"
            )
    elif list(targets.shape) != examples or targets.dtype not in (torch.long, torch.int):
        raise ValueError(
            f"targets: expected classes of shape {examples}, got {targets.dtype} of shape "
            f"{list(targets.shape)}; stack the tasks' labels as .long()"
        )
    elif targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < k:
        raise ValueError(
            f"targets: expected classes 0 to {k - 1}, got {int(targets.min())} to "
            f"{int(targets.max())}; relabel them"
        )


def queries(query: Tensor, weight: Tensor) -> None:
    """Query features of the T tasks that the heads were adapted to."""
    if not isinstance(query, Tensor):
        raise TypeError(f"query: expected a tensor, got {type(query).__name__}; stack the tasks")
    if query.dim() != 3 or query.shape[0] != weight.shape[0] or query.shape[2] != weight.shape[2]:
        expected = f"[{weight.shape[0]}, q, {weight.shape[2]}]"
        raise ValueError(
            f"query: expected shape {expected}, got {list(query.shape)}; "
            "pass the same tasks in the same order"
        )
