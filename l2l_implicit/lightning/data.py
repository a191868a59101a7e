"""Episodes for a Lightning Trainer: one task a batch, any task again by its number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from l2l_implicit import checks

Done = Callable[[], tuple[int, int]]  # the tasks that this device has behind it: in all, this epoch


class EpisodicDataModule(pl.LightningDataModule):
    """Takes the place of learn2learn's ``EpisodicBatcher``, which Lightning 2 refuses.

    A task is drawn with random numbers of its own, which depend on the seed and on its number
    alone. So validation and test see the same tasks every time, a resumed run goes on with the
    tasks it would have seen (in mid-epoch too), workers and devices share the tasks of one process
    out without a repetition, and nobody else's random numbers are touched.

    Args:
        train_tasks: has ``sample()``, which returns inputs and labels of one task.
        validation_tasks: as EpisodicBatcher, ``train_tasks`` by default.
        test_tasks: as EpisodicBatcher, ``validation_tasks`` by default.
        epoch_length: tasks an epoch, over all devices.
        validation_length, test_length: tasks of each, ``epoch_length`` by default.
        seed: of the training tasks; validation and test tasks are the same for every seed.
        num_workers: processes that draw tasks ahead, as in a DataLoader.

    Raises:
        TypeError, ValueError: in one line, for what is no task set or no number of tasks.

    Example:
        >>> from l2l_implicit.lightning import EpisodicDataModule
        >>> from l2l_implicit.tasks import get_tasksets
        >>> sets = get_tasksets("glyphs", train_samples=10, test_samples=10)
        >>> tasks = EpisodicDataModule(sets.train, sets.validation, sets.test, epoch_length=2)
        >>> [images.shape for images, labels in tasks.train_dataloader()]
        [torch.Size([50, 1, 28, 28]), torch.Size([50, 1, 28, 28])]
    """

    def __init__(
        self, train_tasks: Any, validation_tasks: Any = None, test_tasks: Any = None,
        epoch_length: int = 1, *, validation_length: int | None = None,
        test_length: int | None = None, seed: int = 0, num_workers: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        validation = train_tasks if validation_tasks is None else validation_tasks
        self.train_tasks, self.validation_tasks = train_tasks, validation
        self.test_tasks = validation if test_tasks is None else test_tasks
        self.epoch_length = epoch_length
        self.validation_length = epoch_length if validation_length is None else validation_length
        self.test_length = epoch_length if test_length is None else test_length
        self.seed, self.num_workers = seed, num_workers
        for name in ("train_tasks", "validation_tasks", "test_tasks"):
            given = getattr(self, name)
            if not callable(getattr(given, "sample", None)):
                raise TypeError(
                    f"{name}: expected a task set with sample(), got {type(given).__name__}; "
                    "use learn2learn's TaskDataset"
                )
        for name in ("epoch_length", "validation_length", "test_length"):
            checks.count(name, getattr(self, name))

    def train_dataloader(self) -> EpisodeLoader:
        """New tasks in every epoch."""
        return self._loader(f"train {self.seed}", self.train_tasks, self.epoch_length, self._done)

    def val_dataloader(self) -> EpisodeLoader:
        """The same tasks every time."""
        return self._loader("validation", self.validation_tasks, self.validation_length)

    def test_dataloader(self) -> EpisodeLoader:
        """The same tasks every time."""
        return self._loader("test", self.test_tasks, self.test_length)

    def _loader(
        self, name: str, tasks: Any, length: int, done: Done = lambda: (0, 0)
    ) -> EpisodeLoader:
        trainer, episodes = self.trainer, Episodes(tasks, length, name)
        size, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        return EpisodeLoader(
            episodes,
            batch_size=None,
            sampler=EpisodeNumbers(episodes, size, rank, done),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # or every iteration would draw from the user's
        )

    def _done(self) -> tuple[int, int]:
        """What the trainer counts, and finds in a checkpoint."""
        if self.trainer is None:
            return 0, 0
        loop = self.trainer.fit_loop
        return loop.total_batch_idx + 1, loop.batch_idx + 1


class EpisodeLoader(DataLoader):  # type: ignore[type-arg]
    """Says to Lightning that it can go on in mid-epoch: its place is what the trainer counts."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing of its own."""


class Episodes(Dataset):  # type: ignore[type-arg]
    """Tasks by number, without an end.

    Args:
        tasks: has ``sample()``.
        length: of an epoch.
        seed: with a task's number, of its random numbers.
    """

    def __init__(self, tasks: Any, length: int, seed: str) -> None:
        self._tasks, self._length, self._seed = tasks, length, seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Any:
        tasks = self._tasks
        with own_random(f"{self._seed} {number}"):
            if not hasattr(tasks, "sample_task_description") or tasks.num_tasks < 1:
                return tasks.sample()  # of no end, or not learn2learn's
            with own_random(f"task {random.randrange(tasks.num_tasks)}"):
                description = tasks.sample_task_description()
            return tasks.get_task(description)


class EpisodeNumbers(DistributedSampler):  # type: ignore[type-arg]
    """The numbers of an epoch's tasks that are this device's.

    Lightning leaves a DistributedSampler as it is.

    Args:
        episodes: their ``len`` is an epoch's, over all devices; the last round is filled up.
        size, rank: number of devices, and which this is.
        done: where to go on.
    """

    def __init__(self, episodes: Episodes, size: int, rank: int, done: Done) -> None:
        super().__init__(episodes, num_replicas=size, rank=rank, shuffle=False)
        self._done = done

    def __iter__(self) -> Iterator[int]:
        total, in_epoch = self._done()
        left = self.num_samples - in_epoch % self.num_samples
        first = total * self.num_replicas + self.rank
        return iter(range(first, first + left * self.num_replicas, self.num_replicas))


@contextmanager
def own_random(seed: str) -> Iterator[None]:
    """Python's, numpy's and torch's CPU random numbers from ``seed``; afterwards as before."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(random.getrandbits(32))
    torch.default_generator.manual_seed(random.getrandbits(63))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
