"""Reading a loss's graph: is it a loss of a linear head that has a closed form?

Nothing is guessed: what the graph does not say is left to the general path.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from l2l_implicit.inner_problem.boundary import is_boundary
from l2l_implicit.inner_problem.linear_losses import CrossEntropy, OutputLoss, SquaredError
from l2l_implicit.inner_problem.support_features import SupportFeatures

_MEAN, _SUM = 1, 2  # torch's numbers for a loss's reduction


class LinearHeadLoss(NamedTuple):
    """What a loss's graph was found to be: a loss of a linear map of ``features``."""

    features: SupportFeatures
    loss: OutputLoss

    def equal(self, other: LinearHeadLoss) -> bool:
        """Whether both are one loss with one set of targets on the same features."""
        ours, theirs = self.loss, other.loss
        return (
            type(ours) is type(theirs)
            and ours.scale == theirs.scale
            and (self.features is other.features or self.features.equal(other.features))
            and torch.equal(ours.targets, theirs.targets)
        )

    def sharing(self, *known: SupportFeatures) -> LinearHeadLoss:
        """The same with one of the ``known`` features, if they are equal: it may have a basis."""
        equal = [features for features in known if features.equal(self.features)]
        return self._replace(features=equal[0]) if equal else self


def recognize(
    loss: Tensor, parameters: Sequence[Tensor], independent: set[weakref.ref[Tensor]] | None = None
) -> LinearHeadLoss | None:
    """The parts of ``loss`` if its graph is a known loss of a linear head, else None.

    Recognised are cross-entropy (hard targets, no class weights) and the squared error (constant
    targets), reduction ``mean`` or ``sum``, of features of shape ``[m, d]``, with ``parameters``
    (weight, bias) or (weight,).

    Args:
        loss: a scalar with a graph.
        parameters: phi.
        independent: the features whose history was last found to be free of phi, and so of every
            later phi; weak, since a history is as large as its backbone's graph.
    """
    node: Any = loss.grad_fn
    read = None if node is None else _LOSSES.get(node.name())
    found = None if read is None else read(node)
    if found is None:
        return None
    output_loss, linear = found
    features = _features(linear, parameters, set() if independent is None else independent)
    return None if features is None else LinearHeadLoss(features, output_loss)


def _cross_entropy(nll: Any) -> tuple[OutputLoss, Any] | None:
    """The loss and the node that made its logits."""
    softmax = nll.next_functions[0][0]
    if softmax is None or softmax.name() != "LogSoftmaxBackward0" or softmax._saved_dim != 1:
        return None
    targets = nll._saved_target.clone()  # the user's own, which may be written to
    if nll._saved_weight is not None or targets.dim() != 1:
        return None
    if float(nll._saved_total_weight) != len(targets):
        return None  # some targets are ignored
    scale = {_MEAN: 1.0 / len(targets), _SUM: 1.0}.get(nll._saved_reduction)
    if scale is None:
        return None
    log_probabilities, linear = softmax._saved_result.detach(), softmax.next_functions[0][0]
    return CrossEntropy(log_probabilities, targets, scale), linear


def _squared_error(mse: Any) -> tuple[OutputLoss, Any] | None:
    """The loss and the node that made its outputs."""
    (linear, _), (of_target, _) = mse.next_functions
    outputs, targets = mse._saved_self, mse._saved_target  # the user's own: copied below
    if of_target is not None or outputs.dim() != 2 or outputs.shape != targets.shape:
        return None
    scale = {_MEAN: 1.0 / outputs.numel(), _SUM: 1.0}.get(mse._saved_reduction)
    if scale is None or outputs.dtype != targets.dtype:
        return None
    return SquaredError(outputs.detach().clone(), targets.clone(), scale), linear


_LOSSES = {"NllLossBackward0": _cross_entropy, "MseLossBackward0": _squared_error}


def _features(
    linear: Any, parameters: Sequence[Tensor], independent: set[weakref.ref[Tensor]]
) -> SupportFeatures | None:
    """The features that a linear map with just these parameters was applied to."""
    if linear is None or linear.name() not in ("AddmmBackward0", "MmBackward0"):
        return None
    *bias, (origin, _), (transpose, _) = linear.next_functions
    if transpose is None or transpose.name() != "TBackward0":
        return None
    edges = [_edge(p) for p in parameters]
    if edges != [transpose.next_functions[0], *bias]:
        return None
    if bias and not linear._saved_alpha == linear._saved_beta == 1:
        return None
    x = linear._saved_mat1 if bias else linear._saved_self  # the boundary's own copy
    if origin is None:
        return SupportFeatures(x.detach().clone(), None, bool(bias))
    if not is_boundary(origin):
        return None
    source = origin.saved_tensors[0]
    if not any(known() is source for known in independent):
        if _reaches(_edge(source)[0], {node for node, _ in edges}):
            return None
        independent.clear()  # a closure that makes its features anew has others at each step
        independent.add(weakref.ref(source))
    return SupportFeatures(x.detach(), source, bool(bias))


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
