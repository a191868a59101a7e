"""Several tasks in one pass of a backbone end as one pass for each task would."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from oracles import count_operations, relative_error
from small_task import Made
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from l2l_implicit.chunked import Chunked
from l2l_implicit.per_task_norm import _drop_blocks as drop_blocks
from l2l_implicit.per_task_norm import _keep_mask as keep_mask
from l2l_implicit.per_task_norm import per_task_batch_norm

from learn2learn.vision.models import CNN4Backbone, ResNet12Backbone  # isort: skip  (after ours)
from learn2learn.vision.models.cnn4 import OmniglotFC  # isort: skip
from learn2learn.vision.models.resnet12 import DropBlock  # isort: skip

pytestmark = pytest.mark.usefixtures("float64")

TASKS, N = 3, 4
ROUNDING = 1e-11  # of double precision, after a dozen layers


def both(backbone: nn.Module, images: Tensor, passes: int = 2) -> tuple[nn.Module, nn.Module]:
    """A backbone after passes with all tasks together, and a copy after the loop's; compared."""
    together, looped = backbone, copy.deepcopy(backbone)
    keys = list(together.state_dict())
    run = per_task_batch_norm(together, tasks=TASKS)
    for _ in range(passes):
        features = run(images)
        expected = torch.cat([looped(task) for task in images.chunk(TASKS)])
        assert relative_error([features], [expected]) < ROUNDING
        direction = torch.randn_like(expected)
        (features * direction).sum().backward()
        (expected * direction).sum().backward()
    assert list(together.state_dict()) == keys
    states = together.state_dict(), looped.state_dict()
    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-13)
    ours, theirs = ([p.grad for p in net.parameters()] for net in (together, looped))
    # A bias before a batch norm has no effect: its gradient is rounding, so all count as one.
    assert relative_error(ours, theirs) < ROUNDING
    return together, looped


def net_2d(**settings: object) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, **settings), nn.ReLU(), nn.Flatten())


IMAGES_2D = (TASKS * N, 2, 5, 5)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2d": (net_2d, IMAGES_2D),
    "cumulative average": (lambda: net_2d(momentum=None), IMAGES_2D),
    "no running statistics": (lambda: net_2d(track_running_stats=False), IMAGES_2D),
    "not affine": (lambda: net_2d(affine=False), IMAGES_2D),
    "1d sequence": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)),
                    (TASKS * N, 2, 6)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (TASKS * N, 2, 4, 4, 4)),
    "one layer 3d": (lambda: nn.BatchNorm3d(2), (TASKS * N, 2, 4, 4, 4)),
    "per-image norms": (lambda: nn.Sequential(nn.GroupNorm(1, 2), nn.InstanceNorm2d(2),
                                              nn.BatchNorm2d(2)), IMAGES_2D),
    "CNN4": (lambda: CNN4Backbone(hidden_size=4, channels=3), (TASKS * N, 3, 16, 16)),
    "fully connected": (lambda: OmniglotFC(36, 5, sizes=[8, 6]), (TASKS * N, 1, 6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_one_pass_equals_a_pass_for_each_task(name: str) -> None:
    build, shape = NETS[name]
    scales = torch.linspace(0.5, 2.0, TASKS).repeat_interleave(N).view(-1, *[1] * (len(shape) - 1))
    both(build(), scales * torch.randn(shape) + scales)


@pytest.mark.parametrize("name", ["2d", "CNN4", "one layer 3d"])
def test_channels_last_is_kept(name: str) -> None:
    build, shape = NETS[name]
    layout = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    seen: list[bool] = []
    backbone = build().to(memory_format=layout)

    def look(module: nn.Module, args: object, out: Tensor) -> None:
        seen.append(out.is_contiguous(memory_format=layout))

    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.register_forward_hook(look)
    per_task_batch_norm(backbone, TASKS)(torch.randn(shape).contiguous(memory_format=layout))
    assert seen and all(seen)
    both(backbone, torch.randn(shape).contiguous(memory_format=layout))


def test_resnet12_with_its_schedule() -> None:
    """With drop block off in effect; its schedule counts passes, and so moves on by T."""
    backbone = ResNet12Backbone(avg_pool=False, dropblock_dropout=0.0)
    for number in (1, 2, 3, 4):  # narrower
        backbone.inplanes = 3 if number == 1 else 4
        layer = backbone._make_layer(type(backbone.layer1[0]), 4, stride=2, drop_block=True)
        setattr(backbone, f"layer{number}", layer)
    for net in both(backbone.double(), torch.randn(TASKS * N, 3, 16, 16), passes=1):
        blocks = [m for m in net.modules() if hasattr(m, "drop_block")]
        assert [block.num_batches_tracked for block in blocks] == [TASKS] * 4


def test_drop_block_scales_each_task_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    block = DropBlock(block_size=3)
    centers = (torch.rand(N * TASKS, 2, 6, 6) < 0.1).double()
    kept = keep_mask(centers, 3)
    torch.testing.assert_close(kept, block._compute_block_mask(centers))
    assert 0.3 < kept.mean() < 0.9
    x = torch.randn(N * TASKS, 2, 8, 8)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "bernoulli_", lambda self, p: self.copy_(centers))
        got = drop_blocks(block, TASKS, x, gamma=0.1)
    for task in range(TASKS):
        mask = kept[task::TASKS]
        expected = mask * x[task::TASKS] * (mask.numel() / mask.sum())
        torch.testing.assert_close(got[task::TASKS], expected, rtol=1e-6, atol=1e-6)


def test_drop_block_and_dropout_in_a_whole_network() -> None:
    """Random masks differ from the loop's; their share, and the task's own scale, do not."""
    torch.manual_seed(1)
    x = torch.ones(TASKS * 40, 3, 9, 9)
    net = Made(lambda own, x: own.dropout(own.block(x, gamma=0.05)),
               block=DropBlock(block_size=2), dropout=nn.Dropout(0.5))  # fmt: skip
    out = per_task_batch_norm(net, TASKS)(x)
    dropped = (out == 0).double().mean().item()
    expected = 1 - 0.5 * (1 - 0.05) ** 4  # four centers reach a place
    assert dropped == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("training, tasks", [(False, TASKS), (True, 1)])
def test_evaluation_and_one_task_are_plain_passes(training: bool, tasks: int) -> None:
    backbone, images = net_2d().train(training), torch.randn(IMAGES_2D)
    plain = copy.deepcopy(backbone)
    torch.testing.assert_close(per_task_batch_norm(backbone, tasks)(images), plain(images))
    torch.testing.assert_close(backbone.state_dict(), plain.state_dict())


def test_the_backbone_is_left_as_it_was() -> None:
    backbone = net_2d()
    before = {id(m): set(m.__dict__) for m in backbone.modules()}

    hook = backbone[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        per_task_batch_norm(backbone, TASKS)(torch.randn(IMAGES_2D))
    hook.remove()
    assert {id(m): set(m.__dict__) for m in backbone.modules()} == before


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float32])
def test_low_precision_under_autocast(cast: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    backbone, images = net_2d(), torch.randn(IMAGES_2D)
    looped = copy.deepcopy(backbone)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast is torch.bfloat16):
        features = per_task_batch_norm(backbone, TASKS)(images)
        expected = torch.cat([looped(task) for task in images.chunk(TASKS)])
    assert features.dtype == expected.dtype == cast
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(backbone.state_dict(), looped.state_dict())
    assert backbone[1].running_mean.dtype == torch.float32


def checkpointed(reentrant: bool) -> nn.Module:
    """A batch norm within activation checkpointing."""
    run = partial(checkpoint, use_reentrant=reentrant)
    return Made(lambda own, x: run(own.norm, x), norm=nn.BatchNorm2d(2))


MyBatchNorm = type("MyBatchNorm", (nn.BatchNorm2d,), {})
BatchNormOfMine = type("BatchNormOfMine", (nn.Identity,), {})
REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: nn.Sequential(nn.SyncBatchNorm(2)), r"0: expected .* got SyncBatchNorm"),
    (lambda: MyBatchNorm(2), "backbone: expected .* got MyBatchNorm"),
    (BatchNormOfMine, "called a batch norm"),
    (lambda: nn.LazyBatchNorm2d(), "got LazyBatchNorm2d"),
    (lambda: nn.InstanceNorm2d(2, track_running_stats=True), "averaged over the batch"),
    (lambda: parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)), "spectral norm"),
    (lambda: nn.utils.spectral_norm(nn.Conv2d(2, 3, 3)), "spectral norm"),
    (lambda: Chunked(net_2d(), 100), "second pass"),
    (lambda: Made(lambda own, x: own.norm(x.flatten(0, 2)).view(x.shape), norm=nn.BatchNorm1d(5)),
     "norm: expected the batch of 12 images, got 120 rows"),
    (lambda: nn.Flatten(0, 1), "expected one row of features"),
    *((lambda reentrant=reentrant: checkpointed(reentrant), "norm: .* outside of activation check")
      for reentrant in (False, True)),
    (lambda: torch.jit.script(nn.Sequential(nn.BatchNorm2d(2))), "called a batch norm"),
    (lambda: nn.Sequential(*2 * [nn.BatchNorm2d(2)]), "0: expected a batch norm that is called o"),
]


@pytest.mark.parametrize("build, message, tasks", [
    *((build, message, TASKS) for build, message in REFUSED),
    (lambda: nn.BatchNorm2d(2), "expected a multiple of tasks = 5, got 12", 5),
    (lambda: nn.BatchNorm2d(2), "tasks: expected at least 1", 0),
    (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2)),
     "more than 1 value per channel", 12),
])  # fmt: skip
def test_what_would_mix_the_tasks_is_refused(
    build: Callable[[], nn.Module], message: str, tasks: int
) -> None:
    with pytest.raises(ValueError, match=message):
        per_task_batch_norm(build(), tasks)(torch.randn(IMAGES_2D))


def test_the_number_of_operations_does_not_grow_with_the_tasks() -> None:
    counts = []
    for tasks in (2, 16):
        run, images = per_task_batch_norm(net_2d(), tasks), torch.randn(tasks * N, 2, 5, 5)
        counts.append(count_operations(lambda: run(images).square().mean().backward()))  # noqa: B023
    assert counts[0] == counts[1] > 30
