"""Marks in autograd's graph: where theta enters an inner loss, where outputs leave the module, and
where an inner step has ended.

Theta enters by the tensors given to ``forward``, and by leaves that the loss uses directly. This
file and `recognition` are the only ones that know torch's graph from the inside.
"""

import contextlib
import copy
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge

from l2l_implicit.mixed_precision import widened


class Boundary(Function):
    """A copy of a tensor with history, through which theta enters the inner loss.

    The node it leaves in the graph is the record: it has saved its source (and so autograd frees
    it, and notices if it was overwritten), and knows whether a gradient with respect to phi has
    ever passed (``inner``), in which case it is no boundary. The copy may have a wider dtype.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, dtype: torch.dtype | None) -> Tensor:
        ctx.save_for_backward(source)
        ctx.inner = False
        wide = source if dtype is None else widened(source, dtype)
        return source.clone() if wide is source else wide

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.inner = True
        return gradient, None  # autograd rounds it to the source's dtype


def marked(tensor: Tensor, dtype: torch.dtype | None, mark: bool) -> Tensor:
    """An input of the module: marked if it has history, unless ``mark`` is False.

    With a ``dtype``, one of half precision is widened to it.
    """
    if mark and tensor.requires_grad:
        return Boundary.apply(tensor, dtype)
    return tensor if dtype is None else widened(tensor, dtype)


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change`` applied to every tensor, in lists, tuples and dicts too, in order.

    What holds none of these is returned as it is.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | dict) and value:
        mapped: Any = copy.copy(value)  # keeps a class of the caller's own
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            mapped[key] = each_tensor(part, change)
        return mapped
    make = tuple if type(value) is tuple else getattr(value, "_make", None)  # a named one's
    if not isinstance(value, tuple) or make is None:
        return value
    return make(map(functools.partial(each_tensor, change=change), value))


def is_boundary(node: Any) -> bool:
    """Whether a node of the graph is a `Boundary` that no gradient of phi has passed."""
    return isinstance(node, Boundary._backward_cls) and not node.inner  # type: ignore[attr-defined]


def depends_on_phi(tensor: Tensor) -> bool:
    """Whether a marked input is one that a gradient of phi has passed."""
    node: Any = tensor.grad_fn
    return isinstance(node, Boundary._backward_cls) and node.inner  # type: ignore[attr-defined]


def marked_by(node: Any) -> Sequence[Tensor]:
    """The tensors that a mark's node has saved; an error if they were changed in place since."""
    try:
        return node.saved_tensors
    except RuntimeError as error:
        raise RuntimeError(
            "inner loss: expected inputs and outputs of learner(...) as they were when it was "
            "called, got one that was changed in place since; clone it first, or change it after "
            "backward(); or its graph was freed: call backward() on it afterwards"
        ) from error


class Outputs(Function):
    """Copies of the tensors that one pass of a module gave, from which the loss is computed.

    As with `Boundary` the node is the record: it has saved the outputs, and knows the ``made_by``
    that computed them. While ``cut``, no gradient passes it: what then reaches phi from the loss
    has gone around the outputs.
    """

    @staticmethod
    def forward(ctx: Any, made_by: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*outputs)
        ctx.set_materialize_grads(False)
        ctx.made_by, ctx.cut = made_by, False
        return tuple(map(Tensor.clone, outputs))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *((None,) * len(gradients) if ctx.cut else gradients)


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in ``value``, in the order of `each_tensor`."""
    found: list[Tensor] = []
    each_tensor(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def mark_outputs(value: Any, made_by: Any) -> Any:
    """``value`` with every tensor that has history marked as an output of the pass ``made_by``."""
    outputs = [tensor for tensor in tensors_of(value) if tensor.requires_grad]
    if not outputs:
        return value
    marked = iter(Outputs.apply(made_by, *outputs))
    return each_tensor(value, lambda tensor: next(marked) if tensor.requires_grad else tensor)


def find_outputs(loss: Tensor, inner: Sequence[Tensor]) -> tuple[list[Any], bool]:
    """The `Outputs` of phi's passes that ``loss`` is made of, and whether it uses phi besides.

    ``inner`` is phi; a pass with other parameters is an operation like any other.
    """
    known = {id(tensor) for tensor in inner}
    made = {tensor.grad_fn for tensor in inner if tensor.grad_fn is not None}
    found, around, stack = list[Any](), False, [cast(Any, loss.grad_fn)]
    for node in unseen(stack, set()):
        ours = isinstance(node, Outputs._backward_cls)  # type: ignore[attr-defined]
        if ours and known <= node.made_by.parameters:
            found.append(node)
        elif node in made or id(getattr(node, "variable", None)) in known:
            around = True
        else:
            stack.extend(map(CHILD, node.next_functions))
    return found, around


def edges_of(nodes: Iterable[Any]) -> list[GradientEdge]:
    """Where the gradients in the tensors of these `Outputs` arrive, in their order."""
    return [GradientEdge(node, i) for node in nodes for i in range(len(marked_by(node)))]


@contextlib.contextmanager
def cut(nodes: Sequence[Any]) -> Iterator[None]:
    """Within, no gradient passes these `Outputs`."""
    for node in nodes:
        node.cut = True
    try:
        yield
    finally:
        for node in nodes:
            node.cut = False


class MetaInputs(NamedTuple):
    """Where theta enters an inner objective: marked boundaries, and leaves used directly."""

    boundaries: list[Any]
    leaves: list[Tensor]
    names: list[str]  # of the operations in between, by which one loss is told from another

    def sources(self) -> list[Tensor]:
        """The tensors of theta: what was marked, then the leaves."""
        return [*(marked_by(node)[0] for node in self.boundaries), *self.leaves]

    def vjp(
        self, product: Callable[[Sequence[Any]], Sequence[Tensor | None]], inner: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Products with each of `sources`.

        Args:
            product: of the kept inner gradient, with respect to what it is given.
            inner: phi; what reaches a leaf by way of it, or anything by way of a boundary, is cut
                off there: the backward pass goes on from the boundary.
        """
        hooks = [node.register_prehook(_stop) for node in self.boundaries]
        hooks += [p.register_hook(torch.zeros_like) for p in inner if not p.is_leaf]
        # The backward pass calls the leaves' own.
        own = [leaf._backward_hooks for leaf in self.leaves if leaf._backward_hooks]
        kept = [dict(live) for live in own]
        for live in own:
            live.clear()
        try:
            through = product([GradientEdge(node, 0) for node in self.boundaries])
            return [*through, *(product(self.leaves) if self.leaves else ())]
        finally:
            for live, before in zip(own, kept, strict=True):
                live.update(before)
            for hook in hooks:
                hook.remove()


def unseen(stack: list[Any], seen: set[Any]) -> Iterator[Any]:
    """The nodes on ``stack``, each once; the caller adds their children, where it wants them."""
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node


CHILD = operator.itemgetter(0)  # of an edge in ``node.next_functions``


def find_meta_inputs(objective: Tensor, inner: Sequence[Tensor]) -> MetaInputs:
    """Walk the objective's graph down to theta, stopping at phi and at the boundaries.

    Args:
        objective: the inner objective, after its gradient in ``inner`` was taken (by then the
            boundaries that lie downstream of phi have said so).
        inner: tensors to pass over: phi itself, and stand-ins that are accounted for elsewhere.
    """
    known = {id(tensor) for tensor in inner}
    seen = {tensor.grad_fn for tensor in inner if tensor.grad_fn is not None}
    found, stack = MetaInputs([], [], []), [cast(Any, objective.grad_fn)]
    for node in unseen(stack, seen):
        if is_boundary(node):
            found.boundaries.append(node)
        elif type(node).__name__ != "AccumulateGrad":
            found.names.append(node.name())
            stack.extend(map(CHILD, node.next_functions))
        elif id(node.variable) not in known:
            found.leaves.append(node.variable)
    return found


def _stop(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """A node's incoming gradients, as zeros."""
    return tuple(None if g is None else torch.zeros_like(g) for g in gradients)


def end_of_gradients(leaf: Tensor) -> None:
    """Hook of an inner step's parameters, in which ``backward()`` is to leave no gradient.

    It belongs to theta, and there is no way on from here.
    """
    lost, leaf.grad = leaf.grad, None
    if lost is not None and bool(lost.any()):
        raise RuntimeError(
            "expected a loss of the learner's current parameters, got one that depends on those of "
            "an inner step: a closure's, one that calls backward() itself, or features or outputs "
            "kept from one of its calls; return the loss alone, compute these anew or outside"
        )
