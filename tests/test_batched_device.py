"""What a GPU needs of the batched head: few operations, no waiting, float32 under autocast."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batched_tasks import CLASSES, SUPPORT, TASKS, WIDTH, Batch
from torch import Tensor, nn

from l2l_implicit.batched import BatchedImplicitHead

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", ["newton", "gradient"])
def test_low_precision_features_are_solved_in_float32(dtype: torch.dtype, step: str) -> None:
    torch.set_default_dtype(torch.float32)
    head = BatchedImplicitHead(nn.Linear(WIDTH, CLASSES), 0.1, step=step, inner_tol=1.0)
    x = torch.randn(TASKS, SUPPORT, WIDTH).to(dtype)
    y = torch.randint(CLASSES, (TASKS, SUPPORT))

    def run(features: Tensor, forward: bool, backward: bool) -> tuple[Tensor, ...]:
        leaf, query = features.detach().requires_grad_(), features.roll(1, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            adapted = head(leaf, y)
            logits = adapted(query)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        noted = adapted.diagnostics
        return adapted.weight, logits, noted.inner_residual, noted.cg_residual, leaf.grad

    low, plain = run(x, True, False), run(x.float(), False, False)
    assert all(part.dtype == torch.float32 for part in low[:-1]) and low[-1].dtype == dtype
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(low[:-1], plain, strict=False))
    assert torch.equal(low[-1], plain[-1].to(dtype))
    residual = run(x, True, True)[3]
    assert float(residual.max()) < 1e-4  # in bfloat16 it would be 4e-3 at best


def count_operations(run: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


@pytest.mark.parametrize("step", ["newton", "gradient"])
@pytest.mark.parametrize("linear_solver", ["direct", "cg"])
def test_the_number_of_operations_does_not_grow_with_the_tasks(
    step: str, linear_solver: str
) -> None:
    counts = []
    for tasks in (2, 16):
        x, y = torch.randn(tasks, 6, WIDTH), torch.randint(CLASSES, (tasks, 6))
        head = BatchedImplicitHead(
            nn.Linear(WIDTH, CLASSES), 0.1, steps=3, step=step, linear_solver=linear_solver,
            cg_steps=3, cg_tol=1e-14,
        )  # fmt: skip

        def run(head=head, x=x, y=y) -> None:
            leaf = x.clone().requires_grad_()
            adapted = head(leaf, y)
            F.cross_entropy(adapted(leaf).flatten(0, 1), y.flatten()).backward()

        counts.append(count_operations(run))
    assert counts[0] == counts[1]


def not_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the code believe that reading a value waits for a queue."""
    for module in ("linear_solve", "implicit_diff", "head", "check_input"):
        monkeypatch.setattr(f"l2l_implicit.batched.{module}.asking_is_free", lambda tensor: False)


def test_no_tensor_is_turned_into_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the shortcuts that a CPU takes, as on a GPU, nothing waits for the device."""
    not_a_cpu(monkeypatch)
    batch, cases = Batch(), itertools.product(("newton", "gradient"), ("direct", "cg"))
    heads = [batch.make_head(step=step, linear_solver=solver) for step, solver in cases]
    expected = [batch.run(head)[0] for head in heads]

    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor was turned into a number")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero"):
            patch.setattr(Tensor, name, refuse)
        got = [batch.run(head)[0] for head in heads]
    for ours, theirs in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("linear_solver", ["direct", "cg"])
def test_asking_now_and_then_saves_work_and_changes_nothing(
    linear_solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_a_cpu(monkeypatch)
    batch, answers, counts = Batch(), [], []
    for ask_every in (0, 3):
        head = batch.make_head(steps=9, linear_solver=linear_solver, ask_every=ask_every)
        counts.append(count_operations(lambda head=head: answers.append(batch.run(head)[0])))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    assert counts[1] < 0.8 * counts[0]


def test_not_finite_is_said_when_the_diagnostics_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be known earlier without waiting."""
    not_a_cpu(monkeypatch)
    batch = Batch()
    batch.images[1] = torch.nan
    _, adapted = batch.batched()
    with pytest.raises(FloatingPointError, match=r"inner gradient: .* in tasks \[1\]"):
        adapted.diagnostics.tasks()
