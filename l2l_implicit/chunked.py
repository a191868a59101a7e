r"""A feature extractor whose memory does not depend on the number of images.

Theta enters the outer loss :math:`f` only through the features :math:`h_j = h(\theta, x_j)`, so

.. math:: \frac{d f}{d \theta} = \sum_j \Bigl( \frac{\partial h_j}{\partial \theta} \Bigr)^\top
          \frac{d f}{d h_j}

falls apart into chunks of images, and what a chunk's term needs can be computed again when it is
its turn (Chen et al. 2016, *Training deep nets with sublinear memory cost*; the second pass itself
is ``torch.utils.checkpoint``'s).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from l2l_implicit import checks
from l2l_implicit.module_state import FirstPass, SecondPass

_PREFIX = "backbone."


class Chunked(nn.Module):
    """Runs a feature extractor chunk by chunk, and each chunk once more in the backward pass.

    Values and gradients are those of ``backbone(images)``, to rounding. Peak memory is that of one
    chunk's supervised step plus the features; a step costs one more forward pass. The second pass
    finds parameters, buffers, train or eval mode, random numbers and autocast as the first one
    did, and leaves running statistics alone, so they are updated once. Forward hooks inside the
    backbone are called in both passes. What changes with each pass does with each chunk: random
    masks (dropout), spectral norm, the running statistics of instance norm.

    Batch statistics must not cross a chunk: with a batch norm that uses them, each batch has to fit
    into one chunk. Support and query set passed as two batches have statistics of their own.

    ``state_dict()`` has the backbone's own keys, and loads its state.

    Args:
        backbone: maps images ``[m, ...]`` to features ``[m, ...]``, image by image.
        chunk_size: the most images in a chunk; None makes each batch one chunk.

    Raises:
        ValueError, TypeError: for a ``chunk_size`` that is no whole number of at least 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit.chunked import Chunked
        >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten())
        >>> features = Chunked(backbone, chunk_size=10)
        >>> features(torch.randn(25, 3, 8, 8)).sum().backward()
        >>> support, query = features(torch.randn(25, 3, 8, 8), torch.randn(15, 3, 8, 8))
        >>> support.shape, query.shape
        (torch.Size([25, 288]), torch.Size([15, 288]))
    """

    def __init__(self, backbone: nn.Module, chunk_size: int | None = None) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone: expected a torch.nn.Module, got {backbone!r}; wrap it")
        if chunk_size is not None:
            checks.count("chunk_size", chunk_size)
        self.backbone, self.chunk_size = backbone, chunk_size

    def forward(self, *batches: Tensor) -> Any:
        """The features of one batch ``[m, ...]``, or of several, as a tuple.

        Raises:
            ValueError: batch statistics would cross a chunk; or the backbone does not give one row
                of features for each image.
        """
        if not batches or not all(isinstance(batch, Tensor) for batch in batches):
            kinds = ", ".join(type(batch).__name__ for batch in batches) or "nothing"
            raise TypeError(f"images: expected one or more tensors, got {kinds}; pass tensors")
        self._check_batch(max(map(len, batches)))
        features = tuple(self._features(batch) for batch in batches)
        return features if len(features) > 1 else features[0]

    def _features(self, images: Tensor) -> Tensor:
        chunks = images.split(self.chunk_size or max(1, len(images)))
        run = self._run_twice if torch.is_grad_enabled() else self.backbone
        features = []
        for chunk in chunks:
            features.append(run(chunk))
            checks.rows(features[-1], len(chunk))
        return torch.cat(features) if len(features) > 1 else features[0]

    def _run_twice(self, chunk: Tensor) -> Any:
        """The chunk's features, whose backward pass computes what it needs again."""
        first = FirstPass(self.backbone, chunk)
        norms: list[Tensor] = []  # of the features of both passes

        def run(images: Tensor) -> Any:
            features = self.backbone(images)
            if isinstance(features, Tensor):
                norms.append(features.detach().double().norm())
                _check_same(norms[0], norms[-1], features)
            return features

        contexts = lambda: (first, SecondPass(first))  # noqa: E731
        with set_checkpoint_early_stop(False):  # to the end, where they are compared
            return checkpoint(run, chunk, use_reentrant=False, context_fn=contexts)

    def _check_batch(self, largest: int) -> None:
        if self.chunk_size is None or largest <= self.chunk_size:
            return
        for name, module in self.backbone.named_modules():
            if uses_batch_statistics(module):
                raise ValueError(
                    f"chunk_size: expected at least the whole batch of {largest} images, because "
                    f"{name or 'the backbone'} ({type(module).__name__}) takes its statistics from "
                    f"the batch, got {self.chunk_size}; call eval() on it, use GroupNorm, or pass "
                    "smaller batch-norm groups as batches: features(support, query)"
                )

    # The wrapper has no state of its own: its state is the backbone's, under the same keys.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's state, under the backbone's keys."""
        return self.backbone.state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[prefix + _PREFIX + key[len(prefix) :]] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm that, as it is now, lets images depend on each other.

    Known are torch's classes, their subclasses, and others that are called a batch norm.
    """
    name = getattr(module, "original_name", type(module).__name__)  # of a scripted one
    named = "batchnorm" in name.lower().replace("_", "")
    if not (named or isinstance(module, _BatchNorm)):
        return False
    return module.training or getattr(module, "running_mean", module) is None


def _check_same(first: Tensor, now: Tensor, features: Tensor) -> None:
    if not torch.isclose(first, now, rtol=torch.finfo(features.dtype).eps ** 0.5, equal_nan=True):
        raise RuntimeError(
            "backbone: expected the same features when backward() runs a chunk again, got others: "
            "it draws numbers by other means than torch, or counts its passes; use torch.rand"
        )
