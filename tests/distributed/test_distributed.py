"""A meta batch shared out over real torchrun processes."""

import os
import time
from pathlib import Path

import pytest
import rank_process
import torch
from torch import nn
from warm_process import run

from l2l_implicit.distributed import ALONE, Ranks, connect

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "helpers" / "rank_process.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have saved of the jobs that go well."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    done = run([*torchrun, SCRIPT, "sound", folder], ROOT, ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_two_processes_give_the_single_processs_parameters(
    folder: Path, tmp_path: Path, float64: None
) -> None:
    """After 20 outer steps, in float64; the query losses of every task too."""
    rank_process.train(tmp_path, ALONE)
    states = (torch.load(path / "train", weights_only=True) for path in (folder, tmp_path))
    torch.testing.assert_close(*states, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["script", "wrapped", "replicated"])
def test_two_processes_have_the_gradients_of_one_with_all_tasks(
    folder: Path, tmp_path: Path, float64: None, name: str, rank: int
) -> None:
    """By the lines of the page in learn2learn's loop, and under DistributedDataParallel, the whole
    task or the backbone alone."""
    rank_process.script(tmp_path, ALONE)
    paths = folder / f"{name}{rank}", tmp_path / "script0"
    found, expected = (torch.load(path, weights_only=True) for path in paths)
    whole = rank_process.Whole()
    stream = torch.Generator().manual_seed(1)
    tasks = [rank_process.episode(stream) for _ in range(rank_process.META_BATCH)]
    loss = torch.stack([whole(task.inputs, task.support_targets) for task in tasks]).mean()
    one = torch.autograd.grad(loss, list(whole.parameters()))
    assert len(found) == 7 and all(bool(g.any()) for g in found)
    for gradients in (found, expected):
        torch.testing.assert_close(gradients, list(one), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_the_helpers_bring(folder: Path, rank: int) -> None:
    """DistributedDataParallel has neither clone nor adapt, and would not average what goes round.
    """
    alone, shared, nowhere, same, message, refusal, *lists = torch.load(folder / f"seen{rank}")
    assert alone.tolist() == [0.5, 0.5] and shared.tolist() == [1.5, 1.5]
    assert nowhere is None and same.tolist() == [0.0]
    assert message == "rank 1: bad task"
    assert "expected a backbone" in refusal and "Ranks.average" in refusal
    assert lists == [[0, 1], ["a", "b", "c", "d", "e"]]


@pytest.mark.parametrize("job", ["killed", "hangs"])
def test_a_lost_rank_ends_the_job(tmp_path: Path, job: str) -> None:
    done = run([SCRIPT, "torchrun", job, tmp_path], ROOT, ENVIRONMENT)
    assert done.returncode != 0
    assert time.time() - float((tmp_path / "lost").read_text()) < 60
    assert "rank 0 of 2: expected an answer from every rank, got" in done.stderr


def test_one_process_needs_no_second_path() -> None:
    parameter, other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    other.grad = torch.full((1,), 2.0)
    with connect() as ranks:
        assert ranks is ALONE and ranks.first
        ranks.average([parameter, other], 0.5)
        ranks.broadcast([parameter])
        assert ranks.collect(ranks.share([1, 2])) == [1, 2]
        with pytest.raises(ArithmeticError, match="^bad$"), ranks.together(ArithmeticError):
            raise ArithmeticError("bad")
    assert parameter.grad is None and other.grad.tolist() == [1.0]


def test_sparse_gradients_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that have found the same."""
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1, 3])).sum().backward()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda message: message.mul_(2.0))
    Ranks(0, 2).average(embedding.parameters(), 0.5)
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.tolist() == [[0.0, 0.0], [1.0, 1.0]] * 2


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_shares_are_the_whole(size: int) -> None:
    shares = [Ranks(rank, size).share(range(5)) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=f"expected 0 to {size - 1}, got {size}"):
        Ranks(size, size)
