"""What each rank of a torchrun job runs in the tests: `rank_process.py JOB FOLDER`.

`rank_process.py torchrun JOB FOLDER` is torchrun with two ranks that are forked here, where all is
imported.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

import l2l_implicit  # noqa: F401  (first: it makes learn2learn importable)
from experiments.training.algorithms import Algorithms, HeadOnly
from experiments.training.episodes import Episode
from experiments.training.meta_learner import MEASURES, MetaLearner
from l2l_implicit import ImplicitCGHead
from l2l_implicit.distributed import Ranks, connect

STEPS, BATCH = 20, 5


def episode(generator: torch.Generator) -> Episode:
    """Three classes around random centres, 3 support and 3 query samples each."""
    labels = torch.arange(3).repeat(3)
    centres = torch.randn(3, 6, generator=generator)
    noise = torch.randn(18, 6, generator=generator)
    return Episode(centres[labels.repeat(2)] + 0.7 * noise, labels, labels)


def learner() -> MetaLearner:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    l2 = nn.Parameter(torch.tensor(1.0))
    head = ImplicitCGHead(nn.Linear(4, 3), lr=0.1, l2=l2, anchor="init")
    algorithm = HeadOnly(backbone, head, 10, nn.CrossEntropyLoss())
    algorithms = Algorithms(algorithm, algorithm, backbone, head.module)
    return MetaLearner(algorithms, MEASURES["classification"], "adam", 0.01, False)


def train(folder: Path, ranks: Ranks) -> None:
    """Twenty outer steps; rank 0 saves theta and the query losses."""
    meta, stream = learner(), torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        mine = ranks.share([episode(stream) for _ in range(BATCH)])
        results = meta.hypergradient(mine)
        losses.append([result.loss for result in ranks.collect(results)])
        ranks.average(meta.parameters, len(mine) / BATCH)
        meta.optimizer.step()
    if ranks.first:
        torch.save([*(p.detach() for p in meta.parameters), torch.tensor(losses)], folder / "train")


class Whole(nn.Module):
    """A task from its samples to its query loss, by learn2learn's loop over losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        l2 = nn.Parameter(torch.tensor(0.5))
        self.head = ImplicitCGHead(nn.Linear(4, 3), lr=0.1, l2=l2, anchor="init")

    def forward(self, data: Tensor, labels: Tensor) -> Tensor:
        learner, data = self.head.clone(), self.features(data)
        for _step in range(5):
            learner.adapt(F.cross_entropy(learner(data[:9]), labels))
        return F.cross_entropy(learner(data[9:]), labels)


META_BATCH = 4


def script(folder: Path, ranks: Ranks) -> None:
    """The lines that docs/distributed.md puts into learn2learn's loop: one step's gradients."""
    whole, stream = Whole(), torch.Generator().manual_seed(1)
    all_parameters = list(whole.parameters())
    for _task in range(META_BATCH // ranks.size):
        batch = ranks.share([episode(stream) for _ in range(ranks.size)])[0]
        whole(batch.inputs, batch.support_targets).backward()
    for p in all_parameters:
        p.grad.data.mul_(1.0 / META_BATCH)
    ranks.average(all_parameters, weight=1.0)
    torch.save([p.grad for p in all_parameters], folder / f"script{ranks.rank}")


def replicated(folder: Path, ranks: Ranks) -> None:
    """The same with the backbone under DistributedDataParallel; the head is averaged by `ranks`."""
    whole, stream = Whole(), torch.Generator().manual_seed(1)
    parameters, own = list(whole.parameters()), list(whole.head.parameters())
    whole.features = DistributedDataParallel(whole.features)
    for _task in range(META_BATCH // ranks.size):
        batch = ranks.share([episode(stream) for _ in range(ranks.size)])[0]
        (whole(batch.inputs, batch.support_targets) * ranks.size / META_BATCH).backward()
    ranks.average(own, 1 / ranks.size)
    torch.save([p.grad for p in parameters], folder / f"replicated{ranks.rank}")


def wrapped(folder: Path, ranks: Ranks) -> None:
    """The same with the whole task under DistributedDataParallel, which averages over ranks."""
    whole, stream = Whole(), torch.Generator().manual_seed(1)
    ddp, each = DistributedDataParallel(whole), META_BATCH // ranks.size
    for task in range(each):
        batch = ranks.share([episode(stream) for _ in range(ranks.size)])[0]
        with contextlib.nullcontext() if task == each - 1 else ddp.no_sync():
            (ddp(batch.inputs, batch.support_targets) / each).backward()
    torch.save([p.grad for p in whole.parameters()], folder / f"wrapped{ranks.rank}")


def helpers(folder: Path, ranks: Ranks) -> None:
    """Every helper once, with as many answers as a test can look at."""
    alone, shared, nowhere = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    shared.grad = torch.full((2,), 1.0 + ranks.rank)
    if ranks.rank == 1:
        alone.grad = torch.ones(2)
    ranks.average([alone, shared, nowhere], weight=0.5)
    same = torch.full((1,), float(ranks.rank))
    ranks.broadcast([same])
    try:
        with ranks.together(ArithmeticError):
            if ranks.rank == 1:
                raise ArithmeticError("bad task")
        message = "none"
    except ArithmeticError as error:
        message = str(error)
    try:
        DistributedDataParallel(ImplicitCGHead(nn.Linear(3, 2), lr=0.1))
        refusal = "none"
    except TypeError as error:
        refusal = str(error)
    seen = [
        alone.grad, shared.grad, nowhere.grad, same, message, refusal,
        ranks.gather(ranks.rank), ranks.collect(ranks.share("abcde")),
    ]  # fmt: skip
    torch.save(seen, folder / f"seen{ranks.rank}")


def sound(folder: Path, ranks: Ranks) -> None:
    """All that goes well."""
    for job in (helpers, train, replicated, script, wrapped):
        job(folder, ranks)


def meet(folder: Path) -> None:
    """Return when both ranks have come so far; a start takes long on a busy machine."""
    rank = int(os.environ["RANK"])
    (folder / f"here{rank}").touch()
    deadline = time.monotonic() + 200.0
    while not (folder / f"here{1 - rank}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def lose(folder: Path, ranks: Ranks, how: Callable[[], None]) -> None:
    """Rank 1 meets its end at the third step.

    Rank 0 lets torchrun's SIGTERM pass: how soon that comes after the other's end, and whether
    before rank 0 has said what it met, is a matter of who gets a processor first.
    """
    if ranks.first:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for step in range(1000):
        if ranks.rank == 1 and step == 3:
            (folder / "lost").write_text(str(time.time()))
            how()
        ranks.gather(step)
        time.sleep(0.01)


def main(job: str, folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    jobs: dict[str, Callable[[Path, Ranks], None]] = {
        "sound": sound,
        "killed": lambda folder, ranks: lose(
            folder, ranks, lambda: os.kill(os.getpid(), signal.SIGKILL)),
        "hangs": lambda folder, ranks: lose(folder, ranks, lambda: time.sleep(1000)),
    }  # fmt: skip
    if job == "hangs":
        meet(folder)
    with connect(timeout=10.0 if job == "hangs" else 200.0) as ranks:
        jobs[job](folder, ranks)


def forked(job: str, folder: Path) -> None:
    """The same; an error is to be seen, as that of a process of one's own is."""
    try:
        main(job, folder)
    except Exception:
        traceback.print_exc()
        raise


if __name__ == "__main__":
    *torchrun, job, folder = sys.argv[1:]
    if torchrun:
        two = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                           start_method="fork", max_restarts=0)  # fmt: skip
        elastic_launch(two, forked)(job, Path(folder))
    else:
        main(job, Path(folder))
