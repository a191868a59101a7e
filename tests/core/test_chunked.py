"""`Chunked`: the gradient of the whole batch, in the memory of a chunk."""

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_task import adapt
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from experiments.training.peak_memory import peak_memory
from l2l_implicit import ImplicitCGHead
from l2l_implicit.chunked import Chunked

import learn2learn as l2l  # isort: skip  (after l2l_implicit, which repairs it)

pytestmark = pytest.mark.usefixtures("float64")

WAYS, SUPPORT, QUERY = 3, 12, 9
SIZES = [1, 5, 12, 100]
close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13)
LABELS = torch.arange(SUPPORT + QUERY) % WAYS
NORMS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "batch, eval()": lambda: nn.BatchNorm2d(4).eval(),
}


class Network(nn.Sequential):
    """A small extractor that notes what it was called with."""

    def __init__(self, *middle: nn.Module) -> None:
        first = nn.Conv2d(2, 4, 3)
        super().__init__(first, *middle, nn.Softplus(), nn.Conv2d(4, 3, 3), nn.Flatten())
        self.calls: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(images)
        return super().forward(images)


def pictures(number: int = SUPPORT + QUERY) -> Tensor:
    return torch.randn(number, 2, 6, 6)


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    module.zero_grad()
    loss.backward()
    found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    assert found
    return found


def task_loss(features: Callable[[Tensor], Tensor], head: nn.Module, images: Tensor) -> Tensor:
    """An outer loss that uses the features twice: to adapt, and as they are."""
    h = features(images)
    learner = head.clone()
    adapt(learner, lambda: F.cross_entropy(learner(h[:SUPPORT]), LABELS[:SUPPORT]), "loss", 4)
    return F.cross_entropy(learner(h[SUPPORT:]), LABELS[SUPPORT:]) + 0.1 * h.square().mean()


@pytest.mark.parametrize("norm", list(NORMS))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("learner", [ImplicitCGHead, l2l.algorithms.MAML])
def test_the_gradient_is_that_of_the_whole_batch(
    norm: str, size: int, learner: Callable[[nn.Module, float], nn.Module]
) -> None:
    network, x, head = Network(NORMS[norm]()), pictures(), learner(nn.Linear(12, WAYS), 0.1)
    expected = gradients(task_loss(network, head, x), network)
    close(gradients(task_loss(Chunked(network, size), head, x), network), expected)


def test_the_images_second_derivatives_and_a_graph_that_is_kept() -> None:
    network, x = Network(), pictures().requires_grad_()
    leaves = [x, *network.parameters()]

    def curvature(features: Callable[[Tensor], Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(features(x).square().mean(), leaves, create_graph=True)
        return [*first, *gradients(sum(g.square().sum() for g in first), network)]

    close(curvature(Chunked(network, 5)), curvature(network))
    dropping = Network(nn.Dropout(0.5))
    loss, parameters = Chunked(dropping, 5)(x).square().mean(), list(dropping.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    close(list(torch.autograd.grad(loss, parameters)), list(first))


def test_a_network_whose_parameters_adapt() -> None:
    """learn2learn replaces parameters in place; the second pass must find those of the first."""

    def loss(network: nn.Module, images: Tensor) -> Tensor:
        maml = l2l.algorithms.MAML(network, 0.1)
        learner = maml.clone()
        for _ in range(2):
            learner.adapt(learner(images[:SUPPORT]).square().mean())
        return learner(images[SUPPORT:]).square().mean()

    network, x = Network(), pictures()
    expected = gradients(loss(network, x), network)
    close(gradients(loss(Chunked(network, 5), x), network), expected)


def test_support_and_query_as_two_batches_have_their_own_statistics() -> None:
    network, x = Network(nn.BatchNorm2d(4)), pictures()
    twin, parts = copy.deepcopy(network), (x[:SUPPORT], x[SUPPORT:])
    expected = gradients(torch.cat([twin(part) for part in parts]).square().mean(), twin)
    loss = torch.cat(Chunked(network)(*parts)).square().mean()
    close(gradients(loss, network), expected)
    close(list(network.buffers()), list(twin.buffers()))  # written into exactly once
    assert network[1].num_batches_tracked == 2


CROSSING: list[nn.Module] = [
    nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.BatchNorm2d(4, track_running_stats=False).eval(),
    type("BatchNormOfAnotherLibrary", (nn.Identity,), {})(),
    nn.Sequential(nn.Sequential(nn.BatchNorm2d(4))),
    torch.jit.script(nn.Sequential(nn.BatchNorm2d(4))),
]  # fmt: skip


@pytest.mark.parametrize("norm", CROSSING, ids=str)
def test_statistics_that_would_cross_a_chunk_are_an_error(norm: nn.Module) -> None:
    network = Network(norm)
    with pytest.raises(ValueError, match="at least the whole batch of 21.*got 12.*GroupNorm"):
        Chunked(network, 12)(pictures())
    with torch.no_grad(), pytest.raises(ValueError, match="chunk_size"):
        Chunked(network, 12)(pictures())
    assert not network.calls


# What the second pass finds.


class Decaying(nn.Module):
    """Like learn2learn's DropBlock: a rate that a counter of calls changes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x / self.count


def by_hand(network: nn.Module, images: Tensor, size: int) -> Tensor:
    """Chunks without a second pass."""
    return torch.cat([network(chunk) for chunk in images.split(size)])


REMEMBERING: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.5),
    "counter": Decaying,
    "spectral norm": lambda: spectral_norm(nn.Conv2d(4, 4, 1)),
    "running statistics": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
}


@pytest.mark.parametrize("name", list(REMEMBERING))
def test_the_second_pass_computes_what_the_first_did(name: str) -> None:
    network, x = Network(middle := REMEMBERING[name]()), pictures()
    twin = copy.deepcopy(network)
    torch.manual_seed(3)
    expected = gradients(by_hand(twin, x, 8).square().mean(), twin)
    torch.manual_seed(3)
    loss = Chunked(network, 8)(x).square().mean()
    after = torch.get_rng_state()
    close(gradients(loss, network), expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert vars(middle).get("count", 3) == 3
    if list(network.buffers()):
        close(list(network.buffers()), list(twin.buffers()))


def test_a_second_pass_that_computes_something_else_is_an_error() -> None:
    """Here by masks that are no random numbers of torch's."""
    masked = l2l.nn.Lambda(lambda x: x * torch.from_numpy(np.random.rand(*x.shape)).to(x))
    features = Chunked(Network(masked), 8)(pictures())
    with pytest.raises(RuntimeError, match="expected the same features when backward") as caught:
        features.square().mean().backward()
    assert "\n" not in str(caught.value)


def test_the_mode_of_the_first_pass_holds() -> None:
    network, x = Network(nn.BatchNorm2d(4)).eval(), pictures()
    expected = gradients(network(x).square().mean(), network)
    loss = Chunked(network, 8)(x).square().mean()
    network.train()
    close(gradients(loss, network), expected)
    assert network.training and network[1].training


def test_autocast_holds_in_the_second_pass() -> None:
    network, x = Network().float(), pictures().float()
    with torch.autocast("cpu", torch.bfloat16):
        plain, features = by_hand(network, x, 8), Chunked(network, 8)(x)
    assert features.dtype == plain.dtype == torch.bfloat16
    expected = gradients(plain.float().square().mean(), network)
    close(gradients(features.float().square().mean(), network), expected)


def test_the_layout_of_the_images_is_kept() -> None:
    network = Network()
    x = pictures().contiguous(memory_format=torch.channels_last)
    Chunked(network, 8)(x).sum().backward()
    kept = [chunk.is_contiguous(memory_format=torch.channels_last) for chunk in network.calls]
    assert kept == 2 * 3 * [True]


def test_without_gradients_each_chunk_runs_once() -> None:
    network, x = Network(), pictures()
    with torch.no_grad():
        close([Chunked(network, 8)(x)], [network(x)])
    assert [len(chunk) for chunk in network.calls] == [8, 8, 5, 21]


def test_overwritten_parameters_are_an_error_and_leave_the_module_whole() -> None:
    network, x = Network(nn.BatchNorm2d(4)), pictures()
    loss = Chunked(network)(x).sum()
    with torch.no_grad():
        network[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="parameter 0.weight .*before the optimizer"):
        loss.backward()
    assert network[1].num_batches_tracked == 1


def test_the_state_has_the_backbones_keys() -> None:
    network = Network(nn.BatchNorm2d(4))
    model = nn.ModuleDict({"features": Chunked(network, 5), "head": nn.Linear(12, 3)})
    other = Network(nn.BatchNorm2d(4))
    plain = nn.ModuleDict({"features": other, "head": nn.Linear(12, 3)})
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    close(list(model.parameters()), list(plain.parameters()))
    plain.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="Missing.*head"):
        model.load_state_dict(network.state_dict())


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    *((lambda s=size: Chunked(Network(), s), error, "chunk_size")
      for size, error in ((0, ValueError), (2.5, TypeError), (True, TypeError))),
    (lambda: Chunked(torch.sigmoid), TypeError, "torch.nn.Module"),
    (lambda: Chunked(Network())(), TypeError, "got nothing"),
    (lambda: Chunked(Network())([1.0]), TypeError, "got list"),
    (lambda: Chunked(nn.Flatten(0), 5)(pictures()), ValueError,
     "one row of features for each of 5 images"),
    (lambda: Chunked(nn.LSTM(6, 2), 5)(torch.randn(9, 3, 6)), TypeError,
     "tensor of features, got tuple"),
]  # fmt: skip


@pytest.mark.parametrize("make, error, message", BAD)
def test_wrong_settings_modules_and_images(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def peak(features: nn.Module, number: int) -> int:
    x = pictures(number)

    def step() -> None:
        features(x).square().mean().backward()

    step()
    return peak_memory(step)


def test_memory_is_that_of_a_chunk() -> None:
    network = nn.Sequential(*Network(nn.GroupNorm(2, 4)), nn.Linear(12, 2))
    assert peak(Chunked(network, 25), 275) <= 0.25 * peak(network, 275)
    features = 1800 * 2 * 8  # bytes that belong to the images more, and not to a chunk
    growth = peak(Chunked(network, 25), 2000) - peak(Chunked(network, 25), 200)
    assert growth <= 4 * features < 0.1 * peak(network, 2000)
