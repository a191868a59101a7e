"""`LightningImplicitCGHead`: learn2learn's LightningANIL with the implicit hypergradient."""

from __future__ import annotations

import difflib
import inspect
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from learn2learn.algorithms import LightningANIL
from learn2learn.utils import accuracy
from torch import Tensor, nn

from l2l_implicit import checks
from l2l_implicit.learner import ImplicitCGHead
from l2l_implicit.tasks import split_support_query

_ARGUMENTS = inspect.signature(ImplicitCGHead).parameters
_OTHERS = ("model", "lr", "loss", "unknown")  # LightningANIL's, or no setting
_SETTINGS = {name: p.default for name, p in _ARGUMENTS.items() if name not in _OTHERS}
_ANIL = (
    "train_ways", "train_shots", "train_queries", "test_ways", "test_shots", "test_queries", "lr",
    "scheduler_step", "scheduler_decay", "adaptation_steps", "adaptation_lr", "data_parallel",
)  # fmt: skip
_COMMAND_LINE = {"l2": float, "anchor": str, "max_error": float}


class LightningImplicitCGHead(LightningANIL):  # type: ignore[misc]  # learn2learn is untyped
    """Meta-learns features for a head that `ImplicitCGHead` adapts, under a Lightning Trainer.

    Takes the place of ``learn2learn.algorithms.LightningANIL`` and takes what it takes. A batch is
    one task, ``(inputs, labels)``; ``Trainer(accumulate_grad_batches=B)`` makes a meta batch of B
    tasks, whose mean hypergradient moves theta. As in LightningANIL, support and query pass the
    features as one batch, in training mode; what validation and test would change in the features
    (running statistics) is put back.

    ``validate`` and ``test`` work with and without ``Trainer(inference_mode=...)``: the inner
    problem needs gradients, and gets them on copies of the task made outside of that mode.

    Args:
        features: inputs to features; not adapted.
        classifier: features to outputs; adapted.
        loss: of outputs and labels; cross-entropy by default.
        **kwargs: LightningANIL's (``train_ways``, ``train_shots``, ``train_queries``, ``test_*``,
            ``lr``, ``scheduler_step``, ``scheduler_decay``, ``adaptation_lr``,
            ``adaptation_steps``; the last is the most inner steps K, 20 by default, since this
            inner problem is to be solved) and `ImplicitCGHead`'s (``l2``, ``anchor``, ``inner``,
            ``linear``, ...). Others are ignored, as LightningANIL ignores them, so that a whole
            ``**vars(args)`` may be passed. A checkpoint keeps numbers, words and flags;
            ``inner``, ``linear`` and a tensor ``l2`` are passed again to ``load_from_checkpoint``.

    Attributes:
        classifier: the `ImplicitCGHead`; its ``diagnostics`` count what was not solved.

    Raises:
        TypeError: an argument that is all but the name of one of these, or was one once.
        ValueError, TypeError: for a setting out of its range.

    References:
        Yang, Ma, Yu (2025), Algorithm 1.

    Example:
        >>> from torch import nn
        >>> from l2l_implicit.lightning import LightningImplicitCGHead
        >>> module = LightningImplicitCGHead(nn.Linear(20, 10), nn.Linear(10, 5), train_shots=5)
        >>> module.classifier.l2, module.adaptation_steps
        (0.1, 20)
    """

    adaptation_steps = 20

    def __init__(
        self, features: nn.Module, classifier: nn.Module, loss: Any = None, **kwargs: Any
    ) -> None:
        _check_names(kwargs)
        kwargs.setdefault("adaptation_steps", LightningImplicitCGHead.adaptation_steps)
        super().__init__(features, classifier, loss, **kwargs)
        settings = {name: kwargs[name] for name in _SETTINGS if name in kwargs}
        self.classifier = ImplicitCGHead(classifier, self.adaptation_lr, **settings)
        # A tensor or a solver is passed again to load_from_checkpoint.
        plain = (bool, int, float, str, type(None))
        self.save_hyperparameters({k: v for k, v in settings.items() if isinstance(v, plain)})

    @staticmethod
    def add_model_specific_args(parent_parser: ArgumentParser) -> ArgumentParser:
        """LightningANIL's command line options and those of the implicit head."""
        parser: ArgumentParser = LightningANIL.add_model_specific_args(parent_parser)
        for name, kind in _COMMAND_LINE.items():
            parser.add_argument(f"--{name}", type=kind, default=_SETTINGS[name])
        parser.set_defaults(adaptation_steps=LightningImplicitCGHead.adaptation_steps)
        return parser

    def meta_learn(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        """Adapt to a task's support set.

        Args:
            batch: inputs ``[ways * (shots + queries), ...]`` and their labels.
            batch_idx, ways, queries: unused; the labels say what they are.
            shots: support samples a class.

        Returns:
            The loss and the accuracy on the query set; the loss carries the hypergradient where
            gradients are enabled.
        """
        learning = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(learning):
            data, labels = (_normal(tensor) for tensor in batch)
            if learning:
                return self._learn(data, labels, shots)
            with _put_back(self.features):
                return self._learn(data, labels, shots)

    def _learn(self, data: Tensor, labels: Tensor, shots: int) -> tuple[Tensor, Tensor]:
        self.features.train()
        learner = self.classifier.clone()
        learner.train()
        support, query = split_support_query(self.features(data), labels, shots)
        learner.adapt(
            lambda: self.loss(learner(support[0]), support[1]), steps=self.adaptation_steps
        )
        predictions = learner(query[0])
        return self.loss(predictions, query[1]), accuracy(predictions, query[1])

    def log(self, name: str, value: Any, *arguments: Any, **options: Any) -> None:
        """Lightning's, over all devices unless ``sync_dist=False``."""
        options.setdefault("sync_dist", True)
        super().log(name, value, *arguments, **options)


def _normal(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy that autograd may keep if it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


@contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    """The module's mode and buffers are afterwards what they were before."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        for buffer, before in buffers:
            buffer.copy_(before)


def _check_names(given: Mapping[str, Any]) -> None:
    """Unknown names pass as in LightningANIL, but not one that is all but a known one."""
    known = [*_ANIL, *_SETTINGS]
    for name in given:
        checks.renamed(name)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if near and near[0] != name:
            raise TypeError(f"{name}: expected a known argument, got a name close to {near[0]!r}; "
                            f"did you mean {near[0]!r}?")  # fmt: skip
