"""An algorithm as an outer step sees it: learn a task, predict its query set, leave the outer
gradient on theta."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from learn2learn.nn import PrototypicalClassifier
from torch import Tensor, nn
from torchvision.transforms.functional import pad, ten_crop

from experiments.training.episodes import Episode
from experiments.training.peak_memory import LiveStorages
from l2l_implicit import Diagnostics
from l2l_implicit.per_task_norm import per_task_batch_norm
from l2l_implicit.tasks.learn2learn_benchmarks import padding

Loss = Callable[[Tensor, Tensor], Tensor]
Score = Callable[[Tensor, Tensor], float]


class QueryResult(NamedTuple):
    """A task's query loss, score, and the learner's diagnostics if it has any."""

    loss: float
    score: float
    diagnostics: Diagnostics | None


class Adapted(NamedTuple):
    """A learner after its inner loop, and its predictions on the query set."""

    learner: Any
    predictions: Tensor


class Algorithm(ABC):
    """theta, and how a task is learnt from it.

    The learner is behind learn2learn's ``clone``/``adapt``, its module holds phi; ``steps`` are the
    inner steps K, ``loss`` is of predictions and targets. The parameters of ``network`` are theta,
    what the learner learns besides among them.
    """

    def __init__(self, learner: Any, steps: int, loss: Loss) -> None:
        self.learner, self.steps, self.loss = learner, steps, loss
        self.network: nn.Module = learner

    @abstractmethod
    def adapt(self, episode: Episode) -> Adapted:
        """Learn the support set."""

    def learn(self, batch: Sequence[Episode], score: Score) -> list[QueryResult]:
        """Add the mean outer gradient of the tasks to theta's; one of them in memory at a time."""
        return [self._learn_one(episode, 1.0 / len(batch), score) for episode in batch]

    def _learn_one(self, episode: Episode, weight: float, score: Score) -> QueryResult:
        adapted = self.adapt(episode)
        loss = self.loss(adapted.predictions, episode.query_targets)
        self.backward(adapted, loss, weight)
        found = score(adapted.predictions.detach(), episode.query_targets)
        return QueryResult(loss.item(), found, getattr(adapted.learner, "diagnostics", None))

    def backward(self, adapted: Adapted, loss: Tensor, weight: float) -> None:
        """Add ``weight`` times the gradient of the query ``loss`` to theta's gradients."""
        (weight * loss).backward()


class HeadOnly(Algorithm):
    """The head alone is adapted, on the backbone's features.

    Args:
        backbone: inputs to features ``[n, d]``; the learner's module is the head.
        together: support and query pass the backbone as one batch (one set of batch statistics).
        cached: compute the features once a task; else the backbone runs again at every inner
            step, as in the released code of Yang et al.
        squared: the head is fitted to one-hot labels by the mean squared error, not by ``loss``.
        scale: of the head's outputs as predictions, a factor that is meta-learned; None: 1.
    """

    def __init__(
        self, backbone: nn.Module, learner: Any, steps: int, loss: Loss,
        together: bool = True, cached: bool = True, squared: bool = False,
        scale: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__(learner, steps, loss)
        self.backbone, self._together, self._cached = backbone, together, cached
        self._squared, self.scale = squared, scale or nn.Identity()
        self._inner_loss = nn.MSELoss() if squared else loss
        parts = {"backbone": backbone, "head": learner, "scale": self.scale}
        self.network = nn.ModuleDict(parts)

    def adapt(self, episode: Episode) -> Adapted:
        learner, targets = self.learner.clone(), self._goals(episode.support_targets)
        if self._cached:
            support, query = self._both(episode)
            learner.adapt(lambda: self._inner_loss(learner(support), targets), steps=self.steps)
            return Adapted(learner, self.scale(learner(query)))
        m = len(targets)
        learner.adapt(
            lambda: self._inner_loss(learner(self._features(episode, slice(m))), targets),
            steps=self.steps,
        )
        return Adapted(learner, self.scale(learner(self._features(episode, slice(m, None)))))

    def _goals(self, targets: Tensor) -> Tensor:
        """What the head is fitted to: targets ``[..., m]``, or one-hot ones ``[..., m, k]``."""
        if not self._squared:
            return targets
        weight = self.learner.module.weight
        return nn.functional.one_hot(targets, len(weight)).to(weight.dtype)

    def _both(self, episode: Episode) -> tuple[Tensor, Tensor]:
        m = len(episode.support_targets)
        if not self._together:
            return self._features(episode, slice(m)), self._features(episode, slice(m, None))
        return self.backbone(episode.inputs).tensor_split([m])

    def _features(self, episode: Episode, which: slice) -> Tensor:
        if self._together:
            return self.backbone(episode.inputs)[which]
        return self.backbone(episode.inputs[which])


class HeadsTogether(HeadOnly):
    """The heads of a batch's tasks in one inner loop and one linear solve: the same numbers.

    On a GPU the backbone runs once for all tasks. On a CPU, where that is no faster, it runs task
    by task, and the graphs of the tasks are kept until their one backward pass: memory is that of
    as many tasks. Tasks of different sizes are learnt one at a time.

    Args:
        most_bytes: of the graphs that are kept on a CPU; a batch that needs more is learnt in
            groups, of one task at least.
    """

    def __init__(self, *arguments: Any, most_bytes: float = math.inf, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._most_bytes, self._bytes = most_bytes, dict[torch.Size, int]()

    def learn(self, batch: Sequence[Episode], score: Score) -> list[QueryResult]:
        if len({(len(e.support_targets), len(e.query_targets)) for e in batch}) > 1:
            return super().learn(batch, score)
        if batch[0].inputs.is_cuda:
            return self._learn_heads(*self._in_one_pass(batch), batch, 1.0, score)
        results: list[QueryResult] = []
        while left := batch[len(results) :]:
            sets, size = [self._first(left[0])], left[0].inputs.shape
            most = min(len(left), self._most_bytes / max(1, self._bytes[size]))
            group = left[: max(1, int(most))]
            sets += [self._both(episode) for episode in group[1:]]
            support, query = (torch.stack(features) for features in zip(*sets, strict=True))
            weight = len(group) / len(batch)
            results += self._learn_heads(support, query, group, weight, score)
        return results

    def _first(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """Its features; the bytes of their graph are counted where they are not known."""
        if episode.inputs.shape in self._bytes:
            return self._both(episode)
        with LiveStorages() as storages:
            features = self._both(episode)
        self._bytes[episode.inputs.shape] = storages.live
        return features

    def _learn_heads(
        self, support: Tensor, query: Tensor, group: Sequence[Episode], weight: float, score: Score
    ) -> list[QueryResult]:
        """Add ``weight`` times the mean outer gradient of the group; features ``[T, m, d]``."""
        labels = torch.stack([episode.support_targets for episode in group])
        targets = torch.stack([episode.query_targets for episode in group])
        adapted = self.learner.adapt_together(support, self._goals(labels), steps=self.steps)
        predictions = self.scale(adapted(query))
        (weight * self.loss(predictions.flatten(0, 1), targets.flatten(0, 1))).backward()
        triples = zip(predictions.detach(), targets, adapted.diagnostics, strict=True)
        return [QueryResult(self.loss(p, t).item(), score(p, t), d) for p, t, d in triples]

    def _in_one_pass(self, batch: Sequence[Episode]) -> tuple[Tensor, Tensor]:
        """Their features, ``[T, m, d]`` and ``[T, q, d]``; batch statistics stay each set's own.

        Support and query sets of different sizes that go apart take two passes: then the running
        statistics see all support sets first.
        """
        (_, labels, targets), tasks = batch[0], len(batch)
        m, sets_a_task = len(labels), 1 if self._together else 2
        if self._together or m == len(targets):
            backbone = per_task_batch_norm(self.backbone, sets_a_task * tasks)
            both = backbone(torch.cat([e.inputs for e in batch])).unflatten(0, (tasks, -1))
            return both.tensor_split([m], 1)
        backbone = per_task_batch_norm(self.backbone, tasks)
        sets = ([e.inputs[:m] for e in batch], [e.inputs[m:] for e in batch])
        support, query = (backbone(torch.cat(s)).unflatten(0, (tasks, -1)) for s in sets)
        return support, query


class TenCrops(nn.Module):
    """A backbone whose features are the mean over ten crops of the padded image: its corners, its
    centre, and the mirror images of these.

    References:
        Krizhevsky, Sutskever, Hinton (2012), section 4.1, who average predictions. The padding is
        that of training's augmentation, `l2l_implicit.tasks.learn2learn_benchmarks.padding`.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        size = list(images.shape[-2:])
        crops = ten_crop(pad(images, [padding(min(size))]), size)
        return torch.stack([self.backbone(crop) for crop in crops]).mean(0)


class Prototypes(HeadOnly):
    """Snell et al. (2017), eqs. (1), (2): no inner problem; logits are minus the squared distances
    of the features from the class means."""

    def adapt(self, episode: Episode) -> Adapted:
        support, query = self._both(episode)
        means = PrototypicalClassifier(support, episode.support_targets)
        return Adapted(None, means(query))


class WholeNetwork(Algorithm):
    """Every parameter is adapted; support and query pass the network one after the other."""

    def adapt(self, episode: Episode) -> Adapted:
        m, learner = len(episode.support_targets), self.learner.clone()
        self._learn(learner, episode, m, self.steps)
        return Adapted(learner, learner(episode.inputs[m:]))

    def _learn(self, learner: Any, episode: Episode, m: int, steps: int) -> None:
        inputs, targets = episode.inputs[:m], episode.support_targets
        learner.adapt(lambda: self.loss(learner(inputs), targets), steps=steps)


class MultiStepLoss(WholeNetwork):
    r"""Trains on the query losses after all inner steps, the earlier ones less and less.

    At outer iteration i each but the last has the weight :math:`\max(1 - i/A, 0.03)/K`, the last
    the rest of 1; from iteration A on the last counts alone. What is reported is of the last.

    Args:
        anneal: A.

    References:
        Antoniou, Edwards, Storkey (2019), multi-step loss optimization, with the weights of their
        code (``get_per_step_loss_importance_vector``), iterations for its epochs.
    """

    def __init__(self, learner: Any, steps: int, loss: Loss, anneal: int) -> None:
        super().__init__(learner, steps, loss)
        self._anneal = anneal
        learner.register_buffer("iteration", torch.zeros((), dtype=torch.long))  # to be resumed

    def weights(self) -> list[float]:
        """Of the query losses after steps 1 to K, at this outer iteration."""
        left = 1.0 - int(self.learner.iteration) / self._anneal
        early = max(left, 0.03) / self.steps if left > 0.0 else 0.0
        return [early] * (self.steps - 1) + [1.0 - (self.steps - 1) * early]

    def learn(self, batch: Sequence[Episode], score: Score) -> list[QueryResult]:
        results = super().learn(batch, score)
        self.learner.iteration += 1
        return results

    def _learn_one(self, episode: Episode, weight: float, score: Score) -> QueryResult:
        m, learner = len(episode.support_targets), self.learner.clone()
        total, targets = torch.zeros((), device=episode.inputs.device), episode.query_targets
        for share in self.weights():
            self._learn(learner, episode, m, steps=1)
            if share:
                predictions = learner(episode.inputs[m:])
                loss = self.loss(predictions, targets)
                total = total + share * loss
        (weight * total).backward()
        return QueryResult(loss.item(), score(predictions.detach(), targets), None)


class ReptileNetwork(WholeNetwork):
    """Nichol et al. (2018): theta moves towards phi^K; in training no query set is held out.

    Tasks are evaluated by a `WholeNetwork`, which learns the support set alone.
    """

    def _learn(self, learner: Any, episode: Episode, m: int, steps: int) -> None:
        targets = torch.cat([episode.support_targets, episode.query_targets])
        learner.adapt(lambda: self.loss(learner(episode.inputs), targets), steps=steps)

    def backward(self, adapted: Adapted, loss: Tensor, weight: float) -> None:
        adapted.learner.outer_gradient(weight)


class Algorithms(NamedTuple):
    """One algorithm, as it is trained and as it is evaluated, and the modules that it trains."""

    training: Algorithm
    evaluation: Algorithm
    backbone: nn.Module
    head: nn.Module
