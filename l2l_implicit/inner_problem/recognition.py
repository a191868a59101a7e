"""Reading a loss's graph: is it a loss of a linear head that has a closed form?

Nothing is guessed: what the graph does not say is left to the general path.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import GradientEdge
from torch.linalg import vector_norm

from l2l_implicit.inner_problem.boundary import CHILD, Outputs, is_boundary, marked_by, unseen
from l2l_implicit.inner_problem.linear_heads import GOALS, HeadProblem, LinearHeads
from l2l_implicit.inner_problem.linearization import SquaredDistance
from l2l_implicit.inner_problem.losses import CrossEntropy, OutputLoss, SquaredError
from l2l_implicit.vectors import flatten

_MEAN, _SUM = 1, 2  # torch's numbers for a loss's reduction
_TOL = 0.01  # more than rounding (a GPU's of products, too) changes of a gradient


class HeadLoss(NamedTuple):
    """What a loss's graph was found to be: a loss of a linear map of features.

    The task dimension of ``adapt_together`` comes before those of ``x`` and ``targets``.
    """

    x: Tensor  # the features, [m, d], detached; a copy that nobody else writes to
    source: Tensor | None  # the tensor with history that x is a copy of
    origin: tuple[Any, int] | None  # what tensors share with source only if they share its history
    bias: bool  # whether the map adds one
    targets: Tensor  # class indices [m] or values [m, k]; a copy
    loss: type[OutputLoss]
    scale: float  # what the loss is multiplied by: 1, or 1 over what a mean divides by

    def same(self, other: HeadLoss) -> bool:
        """Whether both are one loss with one set of targets on features of the same numbers."""
        return (
            (self.loss, self.scale, self.bias) == (other.loss, other.scale, other.bias)
            and torch.equal(self.x, other.x)
            and torch.equal(self.targets, other.targets)
        )

    def heads(self, phi: Sequence[Tensor], quadratic: SquaredDistance) -> LinearHeads:
        """As the inner problem of one task, or of the T of ``x``, linearized at ``phi``."""
        x, weight, goal = self.x.to(torch.float64), phi[0].shape, GOALS.get(self.x.dtype, 1e-6)
        x = x if x.dim() == 3 else x.unsqueeze(0)
        loss = self.at(x.new_zeros(*x.shape[:2], weight[0]))
        problem = HeadProblem(x, self.source, loss, quadratic, weight, self.bias, goal)
        return LinearHeads(problem, flatten(phi).detach().double().expand(len(x), -1))

    def at(self, outputs: Tensor) -> OutputLoss:
        """The loss at ``outputs``, ``[..., m, k]``: its targets in their shape, classes as ones."""
        if self.loss is CrossEntropy:
            chosen = self.targets.long().view(*outputs.shape[:-1], 1)
            targets = torch.zeros_like(outputs).scatter_(-1, chosen, 1.0)
        else:
            targets = self.targets.to(outputs.dtype).view(outputs.shape)
        return self.loss(outputs, targets, self.scale)

    def is_whole(self, loss: Tensor, outputs: Tensor, linear: Any) -> bool:
        """Whether autograd has this loss's gradient in the ``outputs`` (or log-probabilities) of
        the node ``linear``: a hook may make another of it."""
        (slope,) = grad(loss, [GradientEdge(linear, 0)], retain_graph=True)
        rounding = 16.0 * torch.finfo(slope.dtype).eps * self.scale * slope.numel() ** 0.5
        error = torch.dist(slope, self.at(outputs).gradient)
        return not float(error) > _TOL * float(vector_norm(slope)) + rounding


def recognize(
    loss: Tensor, parameters: Sequence[Tensor], independent: set[weakref.ref[Tensor]],
    trusted: bool = False,
) -> HeadLoss | None:  # fmt: skip
    """What ``loss`` is, if its graph is a known loss of a linear head, else None.

    Recognised are cross-entropy (hard targets, no class weights) and the squared error (constant
    targets), reduction ``mean`` or ``sum``, of features of shape ``[m, d]``, with ``parameters``
    (weight, bias) or (weight,).

    Args:
        independent: the features whose history was last found to be free of phi, and so of every
            later phi; weak, since a history is as large as its backbone's graph.
        trusted: leave out the comparison with autograd's gradient.
    """
    node: Any = loss.grad_fn
    read = None if node is None else _LOSSES.get(node.name())
    found = None if read is None else read(node)
    if found is None:
        return None
    kind, targets, count, linear = found
    scale = {_SUM: 1.0, _MEAN: 1.0 / count if count else None}.get(node._saved_reduction)
    if isinstance(linear, Outputs._backward_cls):  # type: ignore[attr-defined]
        linear = linear.next_functions[0][0]
    if scale is None or linear is None or linear.name() not in ("AddmmBackward0", "MmBackward0"):
        return None
    *bias, (origin, _), (transpose, _) = linear.next_functions
    if transpose is None or transpose.name() != "TBackward0":
        return None
    edges = [transpose.next_functions[0], *bias]
    if len(edges) != len(parameters) or not all(map(_leads_to, edges, parameters)):
        return None
    x = linear._saved_mat1 if bias else linear._saved_self  # the boundary's own copy
    plain = x.layout is torch.strided
    plain &= not bias or linear._saved_alpha == linear._saved_beta == 1
    if not plain or bias and parameters[1].shape not in ((k := len(parameters[0]),), (1, k)):
        return None
    head = HeadLoss(x.detach(), None, None, bool(bias), targets, kind, scale)
    if any(map(_HOOKS, [loss, node._saved_self, x, *parameters])):
        return None  # the user's, which may change the gradient
    if not (trusted or head.is_whole(loss, node._saved_self.detach(), linear)):
        return None
    if origin is None:
        return head._replace(x=head.x.clone())
    if not is_boundary(origin):
        return None
    source, made = marked_by(origin)[0], origin.next_functions[0]
    if weakref.ref(source) not in independent:
        stack, inner = [made[0]], dict(edges)
        for node in unseen(stack, set()):
            if node in inner:
                return None
            stack.extend(map(CHILD, node.next_functions))
        independent.clear()  # a closure that makes its features anew has others at each step
        independent.add(weakref.ref(source))
    return head._replace(source=source, origin=made)


_HOOKS = operator.attrgetter("_backward_hooks")
_Found = tuple[type[OutputLoss], Tensor, int, Any]


def _cross_entropy(nll: Any) -> _Found | None:
    """The loss, its targets, what a mean divides by, and the node that made its logits."""
    softmax = nll.next_functions[0][0]
    if softmax is None or softmax.name() != "LogSoftmaxBackward0" or softmax._saved_dim != 1:
        return None
    targets = nll._saved_target.clone()  # the user's own, which may be written to
    if nll._saved_weight is not None or targets.dim() != 1:
        return None
    if float(nll._saved_total_weight) != len(targets):
        return None  # some targets are ignored
    return CrossEntropy, targets, len(targets), softmax.next_functions[0][0]


def _squared_error(mse: Any) -> _Found | None:
    """The loss, its targets, what a mean divides by, and the node that made its outputs."""
    (linear, _), (of_target, _) = mse.next_functions
    outputs, targets = mse._saved_self, mse._saved_target  # the user's own: copied below
    if of_target is not None or outputs.dim() != 2 or outputs.shape != targets.shape:
        return None
    if outputs.dtype != targets.dtype:
        return None
    return SquaredError, targets.clone(), outputs.numel(), linear


_LOSSES = {"NllLossBackward0": _cross_entropy, "MseLossBackward0": _squared_error}


def _leads_to(edge: tuple[Any, int], tensor: Tensor) -> bool:
    """Whether a gradient that takes this edge arrives at ``tensor``."""
    if tensor.grad_fn is not None:
        return edge == (tensor.grad_fn, tensor.output_nr)
    return getattr(edge[0], "variable", None) is tensor
