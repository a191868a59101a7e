r"""The common case in closed form: cross-entropy of a linear head.

With features :math:`X` (``[m, d]``), logits :math:`Z = X W^\top + c` (``[m, k]``), probabilities
:math:`P`, one-hot targets :math:`T` and :math:`s = 1/m` (or 1 for a sum), the loss has

.. math:: G = s (P - T), \qquad \nabla_W = G^\top X, \quad \nabla_c = G^\top 1

and, for a direction :math:`(V, e)` with :math:`U = X V^\top + e` and
:math:`S = s (P \odot U - P \odot (P \odot U) 1 1^\top)`,

.. math:: \nabla^2_\phi \, (V, e) = (S^\top X, S^\top 1), \qquad
          \nabla^2_{X\phi} \, (V, e) = G V + S W.

A few products of small matrices, no autograd. Any other head or loss takes the general path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from l2l_implicit.linearization import Linearization, Products, is_boundary
from l2l_implicit.regularizer import SquaredDistance


class LinearCrossEntropy(NamedTuple):
    """What a loss's graph was found to be: the cross-entropy of a linear map of ``features``."""

    features: Tensor
    log_probabilities: Tensor
    targets: Tensor
    scale: float
    source: Tensor | None


class LinearHeadLinearization(Linearization):
    """`Linearization` of a `LinearCrossEntropy`; phi is the weight, or weight and bias."""

    def __init__(
        self,
        loss: float,
        parts: LinearCrossEntropy,
        parameters: Sequence[Tensor],
        quadratic: SquaredDistance,
        point: Tensor | None = None,
    ) -> None:
        self._x, self._source = parts.features, parts.source
        self._p = parts.log_probabilities.exp()
        self._scaled_p = self._p * parts.scale
        target = parts.targets.long().unsqueeze(1)
        self._g = self._scaled_p.scatter(1, target, -parts.scale, reduce="add")
        self._bias = len(parameters) == 2
        super().__init__(parameters, loss, self._in_phi(self._g), quadratic, point)

    def _in_phi(self, per_logit: Tensor) -> Tensor:
        """The gradient in phi of a function whose gradient in the logits is ``per_logit``."""
        weight = (per_logit.t() @ self._x).view(-1)
        return torch.cat([weight, per_logit.sum(0)]) if self._bias else weight

    def _split(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """A direction V, and the change S that it makes in the loss's gradient in the logits."""
        classes, width = self.parameters[0].shape
        direction = vector[: classes * width].view(classes, width)
        if self._bias:
            u = torch.addmm(vector[classes * width :], self._x, direction.t())
        else:
            u = self._x @ direction.t()
        u *= self._scaled_p
        return direction, u.addcmul_(self._p, u.sum(1, keepdim=True), value=-1.0)

    def loss_hvp(self, vector: Tensor) -> Tensor:
        return self._in_phi(self._split(vector)[1])

    def loss_sources(self) -> list[Tensor]:
        return [] if self._source is None else [self._source]

    def loss_mixed_vjp(self, vector: Tensor) -> Products:
        if self._source is None:
            return []
        direction, change = self._split(vector)
        weight = self.point[: direction.numel()].view_as(direction)
        return [self._g @ direction + change @ weight]


def recognize(
    loss: Tensor, parameters: Sequence[Tensor], independent: set[Any] | None = None
) -> LinearCrossEntropy | None:
    """The parts of ``loss`` if its graph is the cross-entropy of a linear head, else None.

    Recognised are hard targets, no class weights, reduction ``mean`` or ``sum``, features of
    shape ``[m, d]``, and ``parameters`` (weight, bias) or (weight,). Nothing is guessed: what the
    graph does not say is left to the general path.

    Args:
        loss: a scalar with a graph.
        parameters: phi.
        independent: nodes whose history is known to be free of phi, and so of every later phi;
            new ones are added.
    """
    nll: Any = loss.grad_fn
    if nll is None or nll.name() != "NllLossBackward0" or nll._saved_weight is not None:
        return None
    softmax = nll.next_functions[0][0]
    if softmax is None or softmax.name() != "LogSoftmaxBackward0" or softmax._saved_dim != 1:
        return None
    linear = softmax.next_functions[0][0]
    features = _features(linear, parameters, set() if independent is None else independent)
    if features is None:
        return None
    x, source = features
    log_p, targets = softmax._saved_result.detach(), nll._saved_target
    if targets.dim() != 1 or float(nll._saved_total_weight) != len(targets):
        return None  # some targets are ignored
    scale = {1: 1.0 / len(targets), 2: 1.0}.get(nll._saved_reduction)
    return None if scale is None else LinearCrossEntropy(x, log_p, targets, scale, source)


def _features(
    linear: Any, parameters: Sequence[Tensor], independent: set[Any]
) -> tuple[Tensor, Tensor | None] | None:
    """The features that a linear map with just these parameters was applied to, and theta's end."""
    edges = [_edge(p) for p in parameters]
    if linear is None or linear.name() not in ("AddmmBackward0", "MmBackward0"):
        return None
    *bias, (origin, _), (transpose, _) = linear.next_functions
    if transpose is None or transpose.name() != "TBackward0":
        return None
    if edges != [transpose.next_functions[0], *bias]:
        return None
    if bias and not linear._saved_alpha == linear._saved_beta == 1:
        return None
    x = linear._saved_mat1 if bias else linear._saved_self  # the boundary's own copy
    if origin is None:
        return x.detach(), None
    if not is_boundary(origin):
        return None
    source = origin.saved_tensors[0]
    node = _edge(source)[0]
    if node not in independent:
        if _reaches(node, {node for node, _ in edges}):
            return None
        independent.add(node)
    return x.detach(), source


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """Where a gradient with respect to ``tensor`` arrives: a node and the number of its output."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    return get_gradient_edge(tensor).node, 0


def _reaches(start: Any, nodes: set[Any]) -> bool:
    """Whether the history from the node ``start`` on holds one of ``nodes``."""
    seen: set[Any] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node in nodes:
            return True
        seen.add(node)
        stack.extend(child for child, _ in node.next_functions)
    return False
