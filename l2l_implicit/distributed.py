r"""The tasks of a meta batch shared out over the processes of a ``torchrun`` job.

Every process (rank) holds the same theta and draws the same tasks, takes its share of them, and
adds what the others found. With :math:`B_r` the share of rank :math:`r`,

.. math:: \frac{1}{|B|} \sum_{t \in B} \frac{d f_t}{d \theta} =
          \sum_r \frac{|B_r|}{|B|} \Big( \frac{1}{|B_r|} \sum_{t \in B_r}
          \frac{d f_t}{d \theta} \Big).

The linear solves never leave their process: a task's hypergradient is one vector of theta's size
when it is sent, whatever K and N are. One process is `ALONE`, for which all of this is nothing, so
that a script needs no second path.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from l2l_implicit import checks

Item = TypeVar("Item")

TIMEOUT = 50.0  # seconds: a rank that answers no more ends the job within a minute


class RankLost(RuntimeError):
    """Another process of the job has ended, or does not answer.

    Example:
        Let the job end: torchrun stops the other ranks and names the one that failed. Where
        something is to be put in order first:

        >>> from l2l_implicit.distributed import RankLost, connect
        >>> with connect() as ranks:
        ...     try:
        ...         found = ranks.gather(ranks.rank)
        ...     except RankLost as error:
        ...         print(f"stopping: {error}")
        ...         raise
        >>> found
        [0]
    """


class Ranks:
    """The processes of a job, as one of them sees them.

    What waits for the others raises RankLost if one has ended or does not answer in time.

    Args:
        rank: this process's number, from 0.
        size: how many there are.

    Example:
        >>> from l2l_implicit.distributed import Ranks
        >>> Ranks(rank=1, size=3).share(["a", "b", "c", "d", "e"])
        ['b', 'e']
    """

    def __init__(self, rank: int, size: int) -> None:
        checks.count("size", size)
        if not 0 <= rank < size:
            raise ValueError(f"rank: expected 0 to {size - 1}, got {rank}; see torchrun's RANK")
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this is the one process that records, writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's items: every ``size``-th from the ``rank``-th on; there may be none."""
        return list(items[self.rank :: self.size])

    def gather(self, value: Item) -> list[Item]:
        """Every rank's ``value`` in the order of ranks; anything that pickles."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._answers():
            dist.all_gather_object(values, value)
        return values

    def collect(self, shared: Sequence[Item]) -> list[Item]:
        """What the ranks made of their `share`, in the order of the whole."""
        parts = self.gather(list(shared))
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def average(self, parameters: Iterable[Tensor], weight: float) -> None:
        r"""Replace each ``grad`` by the sum over ranks of :math:`\text{weight} \cdot` ``grad``.

        A gradient that is None counts as zero, and stays None if it is so on every rank.

        Args:
            parameters: theta, the same tensors in the same order on every rank.
            weight: :math:`|B_r| / |B|`, if the gradients are means over this rank's share.
        """
        checks.number("weight", weight)
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for parameter in parameters:
            if self.size > 1:
                kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
            elif parameter.grad is not None and weight != 1.0:
                parameter.grad = weight * parameter.grad
        for alike in kinds.values():
            self._average(alike, weight)

    def _average(self, parameters: list[Tensor], weight: float) -> None:
        """One message: the gradients, and of each whether there was one."""
        pieces = [torch.zeros_like(p) if p.grad is None else weight * p.grad for p in parameters]
        present = [0.0 if p.grad is None else 1.0 for p in parameters]
        dense = [g.to_dense().reshape(-1) for g in pieces]
        message = torch.cat([*dense, dense[0].new_tensor(present)])
        with self._answers():
            dist.all_reduce(message)
        sizes = [*(p.numel() for p in parameters), len(parameters)]
        *sums, found = message.split(sizes)
        for parameter, total, count in zip(parameters, sums, found.tolist(), strict=True):
            parameter.grad = total.view(parameter.shape).clone() if count else None

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` by those of rank 0, so that all start from the same theta."""
        with torch.no_grad(), self._answers():
            for tensor in tensors if self.size > 1 else ():
                dist.broadcast(tensor, 0)

    @contextmanager
    def together(self, kind: type[Exception]) -> Iterator[None]:
        """An error of this kind within is raised on every rank, not on the one that meets it.

        The others would wait for its gradients; so all meet here first. Other errors end the rank,
        and with it the job.

        Args:
            kind: made anew, from the message of the lowest rank that met one.
        """
        met: Exception | None = None
        try:
            yield
        except kind as error:
            if self.size == 1:
                raise
            met = error
        texts = self.gather(None if met is None else str(met))
        for rank, text in enumerate(texts):
            if text is not None:
                raise kind(f"rank {rank}: {text}") from met

    @contextmanager
    def _answers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = re.sub(r"^\[\S+:\d+\] ", "", str(error).splitlines()[0].strip())
            raise RankLost(
                f"rank {self.rank} of {self.size}: expected an answer from every rank, got "
                f"{reason!r}; another rank has ended (its own message says why) or hangs: start "
                "the job again, from its last checkpoint"
            ) from error


ALONE = Ranks(0, 1)
"""One process: its share is everything, and nothing is sent."""


@contextmanager
def connect(timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """The ranks of the job that ``torchrun`` started, or `ALONE` without it.

    Tensors travel by NCCL between GPUs and by gloo between CPUs; everything else by gloo. A
    process group that is there already is used and left as it is.

    Args:
        timeout: seconds that a rank may keep the others waiting, at start too.

    Raises:
        RankLost: not all ranks of the job have come in time.

    Example:
        >>> from l2l_implicit.distributed import connect
        >>> with connect() as ranks:  # not started by torchrun
        ...     print(ranks.size, ranks.collect(ranks.share(["a", "b"])))
        1 ['a', 'b']
    """
    checks.positive("timeout", timeout)
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    ranks = _launched()
    if ranks.size == 1:
        yield ranks
        return
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    with ranks._answers():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def _launched() -> Ranks:
    """What torchrun has written into the environment."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ALONE
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def own_device() -> torch.device:
    """This rank's: one GPU for each process of a machine, or the CPU where there is none.

    Raises:
        ValueError: there are more processes than GPUs.

    Example:
        >>> import torch
        >>> from l2l_implicit.distributed import own_device
        >>> own_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
        True
    """
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpus == 0:
        return torch.device("cpu")
    if processes > gpus:
        raise ValueError(
            f"device: expected at most {gpus} processes on this machine's GPUs, got {processes}; "
            f"use torchrun --nproc-per-node={gpus}, or the CPU"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device
