"""Glyphs under autocast against float32: the same seed, the same tasks. `-s` shows the scores."""

import random
from functools import cache

from l2l_implicit import ImplicitCGHead  # before learn2learn, which it repairs
from l2l_implicit.mixed_precision import overflow_skips
from l2l_implicit.tasks import get_tasksets, split_support_query

import learn2learn as l2l  # isort: skip
import numpy as np  # isort: skip
import pytest  # isort: skip
import torch  # isort: skip
from torch import Tensor, nn  # isort: skip

WAYS, SHOTS, QUERIES, META_BATCH, TEST_TASKS = 5, 5, 5, 2, 300
SIZES = {"train_ways": WAYS, "train_samples": SHOTS + QUERIES,
         "test_ways": WAYS, "test_samples": SHOTS + QUERIES}  # fmt: skip


def seed_all(seed: int) -> None:
    """learn2learn draws from all three."""
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)


def query(
    backbone: nn.Module, head: ImplicitCGHead, task: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, float]:
    """Loss and accuracy after adapting."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        learner, loss = head.clone(), nn.functional.cross_entropy
        (x, y), (x_query, y_query) = split_support_query(backbone(task[0]), task[1], SHOTS)
        learner.adapt(lambda: loss(learner(x), y), steps=20)
        logits = learner(x_query)
        return loss(logits, y_query), float((logits.argmax(1) == y_query).float().mean())


@cache
def trained_and_tested(dtype: torch.dtype, iterations: int = 150, seed: int = 0) -> list[float]:
    """Accuracy on tasks that are the same for all and its half width, in per cent; unsolved."""
    seed_all(seed)
    tasks = get_tasksets("glyphs", **SIZES)
    backbone = l2l.vision.models.CNN4Backbone(hidden_size=32, channels=1, max_pool=True)
    head = ImplicitCGHead(nn.Linear(backbone(tasks.train.sample()[0]).shape[1], WAYS), lr=0.1)
    optimizer = torch.optim.Adam(backbone.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    for _ in range(iterations):
        optimizer.zero_grad()
        with overflow_skips(scaler, backbone.parameters()):
            for _ in range(META_BATCH):
                loss, _ = query(backbone, head, tasks.train.sample(), dtype)
                scaler.scale(loss / META_BATCH).backward()
        scaler.step(optimizer)
        scaler.update()
    seed_all(10_000)
    with torch.no_grad():
        drawn = (tasks.test.sample() for _ in range(TEST_TASKS))
        scores = [100 * query(backbone, head, task, dtype)[1] for task in drawn]
    half_width = 1.96 * np.std(scores, ddof=1) / len(scores) ** 0.5
    return [float(np.mean(scores)), float(half_width), head.diagnostics.unsolved]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_learns_what_float32_learns(dtype: torch.dtype) -> None:
    half, single = trained_and_tested(dtype), trained_and_tested(torch.float32)
    print(f"\n{single}\n{half}")
    assert half[0] + half[1] > single[0] - single[1] and half[2] == 0
