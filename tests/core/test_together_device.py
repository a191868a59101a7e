"""What a GPU needs of tasks together: few operations, no other device, wide enough numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from many_tasks import CLASSES, SUPPORT, TASKS, WIDTH, Batch, assert_same
from torch import Tensor, nn

from l2l_implicit import CG, LBFGS, Direct, GradientDescent, ImplicitCGHead, Neumann, Newton

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning"),
]
INNER = {
    "newton": Newton(),
    "gradient": GradientDescent(),
    "adaptive": GradientDescent(adaptive=True),
    "lbfgs": LBFGS(),
}
LINEAR = {"cg": CG(), "neumann": Neumann(), "direct": Direct()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", ["newton", "gradient"])
def test_low_precision_features_are_solved_as_wide_ones(dtype: torch.dtype, inner: str) -> None:
    torch.set_default_dtype(torch.float32)
    head = ImplicitCGHead(nn.Linear(WIDTH, CLASSES), 0.1, inner=INNER[inner])
    x = torch.randn(TASKS, SUPPORT, WIDTH).to(dtype)
    y = torch.randint(CLASSES, (TASKS, SUPPORT))

    def run(features: Tensor, forward: bool, backward: bool) -> tuple[list[Tensor], list[float]]:
        leaf, query = features.detach().requires_grad_(), features.roll(1, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            adapted = head.adapt_together(leaf, y, 5)
            logits = adapted(query)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        assert leaf.grad is not None and adapted.bias is not None
        noted = [task.cg_residual for task in adapted.diagnostics]
        return [adapted.weight, adapted.bias, logits, leaf.grad], noted

    low, plain = run(x, True, False)[0], run(x.float(), False, False)[0]
    assert all(part.dtype == torch.float32 for part in low[:-1]) and low[-1].dtype == dtype
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(low[:-1], plain, strict=False))
    assert torch.equal(low[-1], plain[-1].to(dtype))
    assert max(run(x, True, True)[1]) < 1e-4  # in bfloat16 it would be 4e-3 at best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_of_the_head_is_kept(dtype: torch.dtype) -> None:
    head = ImplicitCGHead(nn.Linear(WIDTH, CLASSES, dtype=dtype), 0.1)
    x = torch.randn(TASKS, SUPPORT, WIDTH, dtype=dtype, requires_grad=True)
    y = torch.randint(CLASSES, (TASKS, SUPPORT))
    adapted = head.adapt_together(x, y)
    adapted(x).square().sum().backward()
    assert adapted.weight.dtype == adapted(x).dtype == x.grad.dtype == dtype


def count_operations(run: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


@pytest.mark.parametrize("inner, linear", [
    ("newton", "cg"), ("newton", "neumann"), ("newton", "direct"), ("gradient", "cg"),
    ("gradient", "neumann"),
])  # fmt: skip
def test_the_number_of_operations_does_not_grow_with_the_tasks(inner: str, linear: str) -> None:
    """Copies of one task, which take equally many steps; what `Direct` factors is one by one."""
    counts, x1, y1 = [], torch.randn(1, 6, WIDTH), torch.arange(6).view(1, 6) % CLASSES
    for tasks in (2, 16):
        x, y = x1.repeat(tasks, 1, 1), y1.repeat(tasks, 1)
        solvers = {"inner": INNER[inner], "linear": LINEAR[linear]}
        head = ImplicitCGHead(nn.Linear(WIDTH, CLASSES), 0.1, **solvers)

        def run(head=head, x=x, y=y) -> None:  # type: ignore[no-untyped-def]
            leaf = x.clone().requires_grad_()
            adapted = head.adapt_together(leaf, y, 3)
            F.cross_entropy(adapted(leaf).flatten(0, 1), y.flatten()).backward()

        run()
        counts.append(count_operations(run))
    assert abs(counts[1] - counts[0]) <= 0.02 * counts[0]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
def test_nothing_is_made_on_another_device(inner: str, linear: str, together: bool) -> None:
    """A device for new tensors that holds no numbers: what is made without one would be lost."""
    batch = Batch()
    learner = batch.learner(inner=INNER[inner], linear=LINEAR[linear])
    run = batch.together if together else batch.alone
    expected = run(learner, 4)
    with torch.device("meta"):
        found = run(learner, 4)
    assert_same(found, expected, tol=1e-15)
