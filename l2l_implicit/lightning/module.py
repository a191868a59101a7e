"""learn2learn's LightningANIL and LightningMAML with the implicit hypergradient."""

import difflib
import inspect
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from learn2learn.algorithms import LightningANIL, LightningEpisodicModule, LightningMAML
from learn2learn.utils import accuracy
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from l2l_implicit import checks
from l2l_implicit.imaml import ImplicitMAML
from l2l_implicit.learner import ImplicitCGHead
from l2l_implicit.tasks import split_support_query
from l2l_implicit.vectors import buffers_apart

_ARGUMENTS = inspect.signature(ImplicitCGHead).parameters
_OTHERS = ("model", "lr", "loss", "unknown")  # LightningANIL's, or no setting
_SETTINGS = {name: p.default for name, p in _ARGUMENTS.items() if name not in _OTHERS}
_ANIL = (
    "train_ways", "train_shots", "train_queries", "test_ways", "test_shots", "test_queries", "lr",
    "scheduler_step", "scheduler_decay", "adaptation_steps", "adaptation_lr", "data_parallel",
)  # fmt: skip
_COMMAND_LINE = {"l2": float, "anchor": str, "max_error": float}


def f1(outputs: Tensor, labels: Tensor) -> Tensor:
    """Twice the labels that are found, over those found or there: logits and 0 or 1, ``[q, k]``."""
    found, there = outputs > 0, labels > 0.5
    return 2 * (found & there).sum() / (found.sum() + there.sum()).clamp_min(1)


# Of each ``task``: the loss, the metric and its name.
TASKS: dict[str, tuple[type[nn.Module], Callable[[Tensor, Tensor], Tensor], str]] = {
    "classification": (nn.CrossEntropyLoss, accuracy, "accuracy"),
    "regression": (nn.MSELoss, l1_loss, "absolute_error"),
    "multilabel": (nn.BCEWithLogitsLoss, f1, "f1"),
}


class _Implicit(LightningEpisodicModule):  # type: ignore[misc]  # learn2learn is untyped
    """What the modules below share: an `ImplicitCGHead`, at ``_place``, that adapts."""

    adaptation_steps = 20
    _place: str
    _learner: type[ImplicitCGHead]

    def __init__(
        self, *modules: nn.Module, loss: Any = None, task: str = "classification", **kwargs: Any
    ) -> None:
        _check_names(kwargs)
        checks.choice("task", task, TASKS)
        kwargs.setdefault("adaptation_steps", _Implicit.adaptation_steps)
        super().__init__(*modules, TASKS[task][0]() if loss is None else loss, **kwargs)
        settings = {name: kwargs[name] for name in _SETTINGS if name in kwargs}
        setattr(self, self._place, self._learner(modules[-1], self.adaptation_lr, **settings))
        self._classes, self._metric, self._name = task == "classification", *TASKS[task][1:]
        # A tensor or a solver is passed again to load_from_checkpoint.
        plain = (bool, int, float, str, type(None))
        kept = {k: v for k, v in settings.items() if isinstance(v, plain)}
        self.save_hyperparameters({**kept, "task": task})

    @classmethod
    def add_model_specific_args(cls, parent_parser: ArgumentParser) -> ArgumentParser:
        """learn2learn's command line options and those of the implicit learner."""
        parser: ArgumentParser = LightningANIL.add_model_specific_args(parent_parser)
        own = inspect.signature(cls._learner).parameters
        defaults = {**_SETTINGS, **{name: p.default for name, p in own.items()}}
        for name, kind in _COMMAND_LINE.items():
            parser.add_argument(f"--{name}", type=kind, default=defaults[name])
        parser.add_argument("--task", choices=[*TASKS], default="classification")
        parser.set_defaults(adaptation_steps=_Implicit.adaptation_steps)
        return parser

    def meta_learn(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        """Adapt to a task's support set.

        Args:
            batch: inputs ``[n, ...]`` and their labels: classes ``[n]``, numbers ``[n, k]``, or 0
                and 1 ``[n, k]``.
            batch_idx, ways, queries: unused; the labels say what they are.
            shots: support samples a class; without classes, of the task, its first.

        Returns:
            The loss and the metric on the query set; the loss carries the hypergradient where
            gradients are enabled.
        """
        learning = torch.is_grad_enabled()
        as_before = nullcontext() if learning else _put_back(self)
        with torch.inference_mode(False), torch.set_grad_enabled(learning), as_before:
            data, labels = (t.clone() if t.is_inference() else t for t in batch)
            return self._learn(data, labels, shots)

    def _embed(self, data: Tensor) -> Tensor:
        return data

    def _learn(self, data: Tensor, labels: Tensor, shots: int) -> tuple[Tensor, Tensor]:
        learner = getattr(self, self._place).clone()
        learner.train()
        classes = labels if self._classes else torch.zeros(len(labels), device=labels.device)
        (one, _), (two, _) = split_support_query(torch.arange(len(data)), classes, shots)
        h, (one, two) = self._embed(data), (i.to(data.device) for i in (one, two))
        x, y = h[one], labels[one]
        learner.adapt(lambda: self.loss(*self._fit(learner(x), y)), steps=self.adaptation_steps)
        predicted = self._fit(learner(h[two]), labels[two])
        return self.loss(*predicted), self._metric(*predicted)

    def _fit(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels of the outputs' shape: a loss of two shapes broadcasts them without a word."""
        if self._classes:
            return outputs, labels
        if labels.numel() != outputs.numel():
            raise ValueError(
                f"labels: expected one for each of the outputs {tuple(outputs.shape)}, got "
                f"{tuple(labels.shape)}; give the module as many outputs as a sample has labels"
            )
        if self._name == "f1" and not bool(((labels >= 0) & (labels <= 1)).all()):
            raise ValueError(
                f"labels: expected 0 or 1 with task='multilabel', got {float(labels.min()):g} to "
                f"{float(labels.max()):g}; their loss has no minimum"
            )
        return outputs, labels.to(outputs.dtype).view_as(outputs)

    def log(self, name: str, value: Any, *arguments: Any, **options: Any) -> None:
        """Lightning's, over all devices unless ``sync_dist=False``; the metric by its name."""
        options.setdefault("sync_dist", True)
        super().log(name.replace("accuracy", self._name), value, *arguments, **options)


class LightningImplicitCGHead(_Implicit, LightningANIL):  # type: ignore[misc]
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
        loss: of outputs and labels; by default the one of ``task``.
        task: ``'classification'``: cross-entropy and accuracy, ``shots`` samples a class to adapt
            to. ``'regression'``: squared error and ``absolute_error``; ``'multilabel'``: binary
            cross-entropy of logits and ``f1``, over all labels of a task's queries; with either
            the first ``shots`` samples of a task are those to adapt to.
        **kwargs: LightningANIL's (``train_ways``, ``train_shots``, ``train_queries``, ``test_*``,
            ``lr``, ``scheduler_step``, ``scheduler_decay``, ``adaptation_lr``,
            ``adaptation_steps``: at most K inner steps, 20 by default, as this inner problem is to
            be solved) and `ImplicitCGHead`'s. Others are ignored, as LightningANIL ignores them. A
            checkpoint keeps numbers, words and flags; solvers and a tensor ``l2`` are passed again
            to ``load_from_checkpoint``.

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

    _place, _learner = "classifier", ImplicitCGHead

    def __init__(
        self, features: nn.Module, classifier: nn.Module, loss: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(features, classifier, loss=loss, **kwargs)

    def _embed(self, data: Tensor) -> Tensor:
        self.features.train()
        return self.features(data)


class LightningImplicitMAML(_Implicit, LightningMAML):  # type: ignore[misc]
    """Meta-learns the initial value that `ImplicitMAML` adapts, under a Lightning Trainer.

    Takes the place of ``learn2learn.algorithms.LightningMAML``.

    Args:
        model: inputs to outputs; all of it is adapted. The attribute is the `ImplicitMAML`.
        loss, task, **kwargs: as in `LightningImplicitCGHead`, with `ImplicitMAML`'s settings.

    References:
        Rajeswaran et al. (2019), Algorithm 1.

    Example:
        >>> from torch import nn
        >>> from l2l_implicit.lightning import LightningImplicitMAML
        >>> network = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1))
        >>> module = LightningImplicitMAML(network, task="regression", train_shots=10, lr=0.01)
        >>> module.model.anchor, module.model.l2
        ('init', 0.5)
    """

    _place, _learner = "model", ImplicitMAML

    def __init__(self, model: nn.Module, loss: Any = None, **kwargs: Any) -> None:
        super().__init__(model, loss=loss, **kwargs)


@contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    """The module's mode and buffers are afterwards what they were before."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        with buffers_apart(module):
            yield
    finally:
        for part, training in modes:
            part.training = training


def _check_names(given: Mapping[str, Any]) -> None:
    """Unknown names pass as in LightningANIL, but not one that is all but a known one."""
    known = [*_ANIL, *_SETTINGS]
    for name in given:
        checks.renamed(name)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if near and near[0] != name:
            raise TypeError(f"{name}: expected a known argument, got a name close to {near[0]!r}; "
                            f"did you mean {near[0]!r}?")  # fmt: skip
