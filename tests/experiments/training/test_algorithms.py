"""The algorithms as an outer step sees them: variants that must agree, and what theta is."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import finite_difference, relative_error, solve
from torch import Tensor, nn

from experiments.ingredients.algorithm import make_algorithms
from experiments.ingredients.algorithm_table import ALGORITHMS, AlgorithmSettings
from experiments.tracking import UserError
from experiments.training.algorithms import HeadOnly, HeadsTogether
from experiments.training.episodes import Episode
from experiments.training.meta_learner import (
    COUNTS,
    LEAST_L2,
    MEASURES,
    Diverged,
    MetaLearner,
    laid_out,
)

WAYS, SHOTS, SIDE = 3, 2, 8
HEAD_ONLY = [name for name in ALGORITHMS
             if AlgorithmSettings.of({"name": name}).features is not None
             and AlgorithmSettings.of({"name": name}).scope == "head"]  # fmt: skip
SOLVED = ("ImplicitCGHead", "r2d2", "logistic")
pytestmark = pytest.mark.usefixtures("float64")


def backbone() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 6)
    )


def episode(seed: int = 0) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(WAYS).repeat_interleave(SHOTS)
    images = torch.randn(2 * WAYS * SHOTS, 1, SIDE, SIDE, generator=generator)
    return Episode(images, labels, labels)


def meta_learner(name: str, network: nn.Module | None = None, **settings: Any) -> MetaLearner:
    network = network or backbone()
    torch.manual_seed(2)
    measure, chosen = MEASURES["classification"], AlgorithmSettings.of({"name": name, **settings})
    rest = (WAYS, WAYS, measure.loss, torch.device("cpu"))
    algorithms = make_algorithms(chosen, network, 6, *rest)
    return MetaLearner(algorithms, measure, "sgd", 0.1, channels_last=False)


def gradients(name: str, *episodes: Episode, **settings: Any) -> list[Tensor]:
    learner = meta_learner(name, **settings)
    learner.hypergradient(episodes or [episode()])
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.parameters]


@pytest.mark.parametrize("name", HEAD_ONLY)
@pytest.mark.parametrize("batch_norm", ["together", "separately", "eval"])
def test_as_published_is_the_cached_gradient(name: str, batch_norm: str) -> None:
    same = {"batch_norm": batch_norm, "steps": 4}
    if name in SOLVED:  # cached, it is exact; the other way it is as near as it is asked to be
        same |= {"steps": 12, "cg_tol": 1e-12, "cg_steps": 60}
    published = gradients(name, features="as_published", **same)
    assert relative_error(published, gradients(name, **same)) < 1e-10


def test_eval_leaves_the_running_statistics_alone() -> None:
    learner = meta_learner("ImplicitCGHead", batch_norm="eval")
    before = {k: b.clone() for k, b in learner.algorithms.training.network.named_buffers()}
    learner.hypergradient([episode()])
    for name, buffer in learner.algorithms.training.network.named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_batch_leaves_the_mean_over_its_tasks(name: str) -> None:
    first, second = gradients(name, episode(0)), gradients(name, episode(1))
    both = gradients(name, episode(0), episode(1))
    assert relative_error(both, [(a + b) / 2 for a, b in zip(first, second, strict=True)]) < 1e-10


SOLVERS = {
    "newton": {},
    "gradient": {"step": "gradient", "cg_tol": 1e-12, "cg_steps": 60},
    "auto": {"step": "gradient", "lr": "auto", "solver": "direct"},
    "lbfgs": {"step": "lbfgs", "cg_tol": 1e-11, "solver": "direct", "damping": 0.1},
    "neumann": {"solver": "neumann", "cg_tol": 1e-12, "cg_steps": 4000},
}


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
@pytest.mark.parametrize("batch_norm", ["together", "separately", "eval"])
@pytest.mark.parametrize(
    ("name", "solver"), [(SOLVED[0], key) for key in SOLVERS] + [(n, "newton") for n in SOLVED[1:]]
)
def test_all_tasks_at_once_give_the_same_gradient(name: str, solver: str, batch_norm: str) -> None:
    same = {"batch_norm": batch_norm, **SOLVERS[solver]}
    tasks = [episode(seed) for seed in range(3)]
    at_once, alone = (gradients(name, *tasks, together=t, **same) for t in (True, False))
    assert relative_error(at_once, alone) < 1e-9


def state_after(most_bytes: float = math.inf, **settings: Any) -> list[Tensor]:
    """What a backbone with batch norm and dropout has after a batch, and the generator's state."""
    learner = meta_learner("ImplicitCGHead", **settings)
    training = learner.algorithms.training
    if isinstance(training, HeadsTogether):
        training._most_bytes = most_bytes
    training.backbone.insert(3, nn.Dropout(0.2))
    torch.manual_seed(3)
    results = learner.hypergradient([episode(seed) for seed in range(5)])
    gradient = torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None])
    buffers = [b.double().flatten() for b in training.network.buffers()]
    numbers = [[r.loss, r.score, r.diagnostics.hypergradients] for r in results]
    return [gradient, torch.cat(buffers), torch.tensor(numbers), torch.get_rng_state().double()]


@pytest.mark.parametrize("batch_norm", ["together", "separately"])
@pytest.mark.parametrize("most_bytes", [math.inf, 40_000.0, 0.0])
def test_all_tasks_at_once_leave_the_same_state(batch_norm: str, most_bytes: float) -> None:
    """Random masks, running statistics, gradients; in one group, in several, or each task alone."""
    at_once = state_after(most_bytes, batch_norm=batch_norm, together=True)
    alone = state_after(batch_norm=batch_norm, together=False)
    for found, expected in zip(at_once, alone, strict=True):
        assert (found - expected).norm() <= 1e-9 * expected.norm()


def test_a_batch_is_learnt_in_groups_of_what_may_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    whole = HeadsTogether._learn_heads

    def noted(self: HeadsTogether, support: Tensor, *rest: Any) -> Any:
        groups.append(len(support))
        return whole(self, support, *rest)

    monkeypatch.setattr(HeadsTogether, "_learn_heads", noted)
    learner = meta_learner("ImplicitCGHead")
    training, tasks = learner.algorithms.training, [episode(seed) for seed in range(5)]
    learner.hypergradient(tasks)
    (one,) = training._bytes.values()
    inputs, last = tasks[0].inputs.nbytes, 12 * 6 * 8
    assert 4 * inputs < one < 20 * inputs + last  # about 4 channels of 6 by 6, four times
    training._most_bytes = 2.5 * one
    learner.hypergradient(tasks)
    training._most_bytes = 0.5 * one
    learner.hypergradient(tasks[:2])
    assert groups == [5, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("batch_norm", ["together", "separately", "eval"])
def test_one_pass_of_the_backbone_is_one_for_each_task(batch_norm: str) -> None:
    """What a GPU does: the same features, running statistics and hypergradient."""
    tasks, found = [episode(seed) for seed in range(3)], []
    for one_pass in (True, False):
        learner = meta_learner("ImplicitCGHead", batch_norm=batch_norm)
        training = learner.algorithms.training
        assert isinstance(training, HeadsTogether)
        if one_pass:
            score = learner.measure.score
            training._learn_heads(*training._in_one_pass(tasks), tasks, 1.0, score)
        else:
            learner.hypergradient(tasks)
        gradient = [p.grad.flatten() for p in learner.parameters if p.grad is not None]
        found.append(torch.cat(gradient + [b.flatten() for b in training.network.buffers()]))
    assert (found[0] - found[1]).norm() <= 1e-10 * found[1].norm()


def test_one_pass_takes_sets_of_different_sizes() -> None:
    whole = [episode(seed) for seed in range(2)]
    tasks = [Episode(e.inputs[:-3], e.support_targets, torch.arange(3)) for e in whole]
    for batch_norm in ("together", "separately"):
        training = meta_learner("ImplicitCGHead", batch_norm=batch_norm).algorithms.training
        assert isinstance(training, HeadsTogether)
        found = training._in_one_pass(tasks)
        expected = zip(*(training._both(task) for task in tasks), strict=True)
        for features, each in zip(found, expected, strict=True):
            assert (features - torch.stack(each)).norm() <= 1e-12 * features.norm()


def test_tasks_of_different_sizes_are_learnt_one_at_a_time() -> None:
    small = Episode(episode(1).inputs[3:], torch.arange(3), episode(1).query_targets)
    tasks = [episode(0), small, episode(2)]
    at_once, alone = (gradients("ImplicitCGHead", *tasks, together=t) for t in (True, False))
    assert relative_error(at_once, alone) < 1e-12


def test_heads_are_learnt_together_unless_that_gains_nothing() -> None:
    def together(**changes: Any) -> bool:
        training = meta_learner("ImplicitCGHead", **changes).algorithms.training
        return isinstance(training, HeadsTogether)

    assert together() and together(step="gradient") and together(step="lbfgs", together=True)
    assert not together(step="lbfgs") and not together(together=False)
    assert not together(features="as_published")


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
def test_a_step_reports_what_was_solved_and_what_was_not() -> None:
    step = meta_learner("ImplicitCGHead").step([episode(seed) for seed in range(3)])
    assert [step[name] for name in COUNTS] == [0, 0, 0]
    assert 0 < step["hypergradient_error"] < 1e-3
    plain = meta_learner("anil").step([episode()])
    assert set(plain) == {"query_loss", "query_accuracy", "hypergradient_norm", "seconds",
                          "cpu_seconds"}  # fmt: skip
    learner = meta_learner("ImplicitCGHead", step="gradient", steps=1, cg_steps=1)
    step = learner.step([episode(seed) for seed in range(3)])
    assert [step[name] for name in COUNTS] == [3, 3, 3]


@pytest.mark.parametrize("name", ["anil", "maml"])
def test_engines_agree(name: str) -> None:
    assert relative_error(gradients(name, engine="learn2learn"), gradients(name)) < 1e-12


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"protonet"}))
def test_an_initial_head_gets_a_gradient_if_it_is_learned(name: str) -> None:
    learner = meta_learner(name)
    learner.hypergradient([episode()])
    head = list(learner.algorithms.head.parameters())
    found = [p.grad is not None and bool(p.grad.any()) for p in head]
    assert found == 2 * [name not in (*SOLVED, "itd_bio")]


def test_reptile_moves_towards_the_adapted_parameters() -> None:
    learner = meta_learner("reptile", steps=3, lr=0.05)
    start = [p.detach().clone() for p in learner.parameters]
    task = episode()
    labels = torch.cat([task.support_targets, task.query_targets])
    copy = meta_learner("reptile").algorithms.training.network
    for _ in range(3):
        nn.functional.cross_entropy(copy(task.inputs), labels).backward()
        with torch.no_grad():
            for p in copy.parameters():
                p -= 0.05 * p.grad
                p.grad = None
    learner.hypergradient([task])
    expected = [a - b.detach() for a, b in zip(start, copy.parameters(), strict=True)]
    assert relative_error([p.grad for p in learner.parameters], expected) < 1e-12


def test_meta_learned_scalars_are_part_of_theta() -> None:
    learner = meta_learner("unrolled", learn_lr=True, optimizer="adam")
    lr = learner.algorithms.training.learner.lr
    assert any(p is lr for p in learner.parameters)
    before = lr.item()
    learner.step([episode()])
    assert lr.item() != before
    assert learner.algorithms.evaluation.learner.lr is lr


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_meta_learned_regulariser_stays_positive(name: str, sign: float) -> None:
    """An outer step of the largest size, which leads to a negative one or to a large one."""
    learner = meta_learner(name, learn_l2=True)
    l2 = learner.algorithms.training.learner.l2
    assert any(p is l2 for p in learner.parameters)
    before, hypergradient = l2.item(), learner.hypergradient

    def signed(batch: Any) -> Any:
        found = hypergradient(batch)
        l2.grad = sign * l2.grad.abs()
        return found

    learner.hypergradient = signed  # type: ignore[method-assign]
    learner.optimizer.param_groups[0]["lr"] = 1e6
    learner.step([episode()])
    assert l2.item() == LEAST_L2 if sign > 0 else l2.item() > before
    assert learner.algorithms.evaluation.learner.l2 is l2


LOSSES = {
    "r2d2": lambda z, y: F.mse_loss(z, F.one_hot(y, WAYS).double()),
    "logistic": F.cross_entropy,
}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_learned_scale_and_regulariser_by_finite_differences(name: str, together: bool) -> None:
    """And the features; minima of the inner problem are found by dense Newton steps."""
    learner = meta_learner(name, nn.Identity(), together=together, l2=0.3, scale=2.0)
    training, half = learner.algorithms.training, WAYS * SHOTS
    labels = torch.arange(WAYS).repeat_interleave(SHOTS)
    features = torch.randn(2 * half, 6).requires_grad_()
    theta = [features, training.learner.l2, training.scale.alpha]
    assert {*map(id, theta[1:])} <= {*map(id, learner.parameters)}

    def outputs(phi: Tensor, x: Tensor) -> Tensor:
        return x @ phi[: 6 * WAYS].view(WAYS, 6).t() + phi[6 * WAYS :]

    def inner(phi: Tensor, x: Tensor, l2: Tensor, scale: Tensor) -> Tensor:
        return LOSSES[name](outputs(phi, x[:half]), labels) + l2 / 2 * phi.square().sum()

    def outer(phi: Tensor, x: Tensor, l2: Tensor, scale: Tensor) -> Tensor:
        return F.cross_entropy(scale * outputs(phi, x[half:]), labels)

    (result,) = learner.hypergradient([Episode(features, labels, labels)])
    fixed = [t.detach() for t in theta]
    phi = solve(lambda p: inner(p, *fixed), torch.zeros(7 * WAYS))
    assert result is not None and abs(result.loss - float(outer(phi, *fixed))) < 1e-9
    for i, part in enumerate(theta):
        direction = [torch.randn_like(t) if j == i else 0.0 * t for j, t in enumerate(fixed)]
        expected = finite_difference(inner, outer, theta, direction, phi)
        assert abs(float((part.grad * direction[i]).sum()) - expected) < 1e-7 * abs(expected)


@pytest.mark.parametrize("batch_norm", ["together", "separately", "eval"])
def test_prototypes_are_class_means(batch_norm: str) -> None:
    """With labels in any order, and in evaluation as in training."""
    algorithms = meta_learner("protonet", batch_norm=batch_norm).algorithms
    task, order = episode(), torch.randperm(WAYS * SHOTS)
    mixed = Episode(torch.cat([task.inputs[:6][order], task.inputs[6:]]),
                    task.support_targets[order], task.query_targets)  # fmt: skip
    x = algorithms.backbone(task.inputs)
    if batch_norm == "separately":
        x = torch.cat([algorithms.backbone(part) for part in task.inputs.split(6)])
    means = x[:6].unflatten(0, (WAYS, SHOTS)).mean(1)
    expected = -torch.stack([(q - means).square().sum(1) for q in x[6:]])
    for algorithm in algorithms[:2]:
        torch.testing.assert_close(algorithm.adapt(mixed).predictions, expected)


def test_multi_step_loss_is_a_weighted_sum_of_mamls() -> None:
    """Weights as in the authors' code, with an iteration as the epoch; saved with theta."""
    k, anneal = 3, 40
    learner = meta_learner("maml_msl", steps=k, anneal=anneal)
    training = learner.algorithms.training
    parts = [gradients("maml", steps=steps) for steps in range(1, k + 1)]
    for epoch in (0, 1, 20, 39, 40):
        training.learner.iteration.fill_(epoch)
        decay, least = 1 / k / anneal, 0.03 / k
        weights = [max(1 / k - epoch * decay, least)] * (k - 1)
        weights.append(min(1 / k + epoch * (k - 1) * decay, 1 - (k - 1) * least))
        if epoch >= anneal:
            weights = [0.0] * (k - 1) + [1.0]
        assert training.weights() == pytest.approx(weights)
        learner.hypergradient([episode()])
        expected = [sum(w * g for w, g in zip(weights, each, strict=True))
                    for each in zip(*parts, strict=True)]  # fmt: skip
        assert relative_error([p.grad for p in learner.parameters], expected) < 1e-12
    other = meta_learner("maml_msl", steps=k, anneal=anneal)
    other.load_state_dict(learner.state_dict())
    assert int(other.algorithms.training.learner.iteration) == anneal + 1


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_its_state_is_all_that_training_goes_on_from(name: str, tmp_path: Path) -> None:
    changes = {"learn_l2": True} if name in SOLVED else {}
    whole, other = (meta_learner(name, **changes) for _ in range(2))
    whole.step([episode(0)])
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    ends = [(learner.step([episode(1)])["query_loss"], learner) for learner in (whole, other)]
    assert ends[0][0] == ends[1][0]
    for a, b in zip(*(x.parameters for _, x in ends), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [*SOLVED, "itd_bio", "protonet"])
def test_a_head_that_is_not_learned_can_be_tested_with_other_ways(name: str) -> None:
    rest = (WAYS, 2, nn.CrossEntropyLoss(), torch.device("cpu"))
    found = make_algorithms(AlgorithmSettings.of({"name": name}), backbone(), 6, *rest)
    task = Episode(episode().inputs[:8], torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]))
    with torch.no_grad():
        assert found.evaluation.adapt(task).predictions.shape == (4, 2)
    with pytest.raises(UserError, match="expected test_ways=3 as in training, got 2"):
        make_algorithms(AlgorithmSettings.of({"name": "anil"}), backbone(), 6, *rest)


def test_a_network_can_be_tested_by_its_head_alone() -> None:
    """Yang et al., Table 1: MAML's test accuracy adapts the head only."""
    evaluation = meta_learner("maml", test_scope="head", test_steps=20).algorithms.evaluation
    assert isinstance(evaluation, HeadOnly) and evaluation.steps == 20
    with torch.no_grad():
        assert evaluation.adapt(episode()).predictions.shape == (WAYS * SHOTS, WAYS)


def test_a_head_can_be_held_closer_in_test() -> None:
    """It is the head of a learner that was trained with that l2; training has its own."""
    theirs = meta_learner("ImplicitCGHead", l2=3.0).algorithms
    ours = meta_learner("ImplicitCGHead", l2=0.1, test_l2=3.0).algorithms
    assert (ours.training.learner.l2, ours.evaluation.learner.l2) == (0.1, 3.0)
    ours.backbone.load_state_dict(theirs.backbone.state_dict())
    with torch.no_grad():
        found, right = (a.evaluation.adapt(episode()).predictions for a in (ours, theirs))
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("name", ["ImplicitCGHead", "protonet"])
def test_features_in_test_are_the_mean_over_ten_crops(name: str) -> None:
    """Of images padded by 4 on each side: where a crop begins is written out here."""
    settings = AlgorithmSettings.of({"name": name, "test_crops": 10})
    images, pixels = torch.rand(4, 3, 8, 10), nn.Flatten()
    width = pixels(images).shape[1]
    args = settings, pixels, width, 2, 2, nn.CrossEntropyLoss(), torch.device("cpu")
    found = make_algorithms(*args)
    assert isinstance(found.training, HeadOnly) and found.training.backbone is pixels
    padded = torch.zeros(4, 3, 16, 18)
    padded[:, :, 4:12, 4:14] = images
    crops = [padded[:, :, top : top + 8, left : left + 10]
             for top, left in ((0, 0), (0, 8), (8, 0), (8, 8), (4, 4))]  # fmt: skip
    right = sum(pixels(crop) + pixels(crop.flip(3)) for crop in crops) / 10
    assert isinstance(found.evaluation, HeadOnly)
    torch.testing.assert_close(found.evaluation.backbone(images), right)


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
@pytest.mark.parametrize("name", ["anil", "maml", "as_released", "ImplicitMAML", "reptile"])
def test_a_diverging_inner_loop_is_said_before_theta_moves(name: str) -> None:
    variant = {"variant": name} if name == "as_released" else {}
    learner = meta_learner("ImplicitCGHead" if variant else name, **variant, lr=1e200, steps=5)
    before = [p.detach().clone() for p in learner.parameters]
    with pytest.raises(Diverged):
        learner.step([episode()])
    for p, value in zip(learner.parameters, before, strict=True):
        assert torch.equal(p, value)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [True, False])
def test_convolutions_follow_the_layout_and_no_pixel_moves(
    channels: int, channels_last: bool
) -> None:
    images = torch.randn(5, channels, 6, 4)
    for given in (images, images[::2], images.to(memory_format=torch.channels_last)):
        shown = laid_out(given, channels_last)
        assert torch.equal(shown, given)
        convolution = nn.Conv2d(channels, 8, 3, padding=1)
        if channels_last:
            convolution = convolution.to(memory_format=torch.channels_last)
        made = convolution(shown)
        assert made.is_contiguous(memory_format=torch.channels_last) == channels_last
        torch.testing.assert_close(made, convolution(given.contiguous()))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_outer_step_decays_along_a_cosine(optimizer: str) -> None:
    """Four steps by hand: the step size, and the share of theta that each takes away."""
    algorithms = meta_learner("ImplicitCGHead").algorithms
    lr, decay, steps = 0.1, 0.02, 4
    rest = ("classification", optimizer, lr)
    learner = MetaLearner(algorithms, MEASURES[rest[0]], *rest[1:], channels_last=False,
                          weight_decay=decay)  # fmt: skip
    first = [torch.zeros_like(p) for p in learner.parameters]
    second = [torch.zeros_like(p) for p in learner.parameters]
    for n in range(steps):
        before = [p.detach().clone() for p in learner.parameters]
        learner.anneal(n / steps)
        learner.step([episode(n)])
        size = lr * (1 + math.cos(math.pi * n / steps)) / 2
        for p, old, m, v in zip(learner.parameters, before, first, second, strict=True):
            if p.grad is None:
                continue
            if optimizer == "sgd":
                expected = old - size * (p.grad + decay * old)
            else:  # Kingma, Ba (2015), Algorithm 1; Loshchilov, Hutter (2019), Algorithm 2
                m.mul_(0.9).add_(p.grad, alpha=0.1)
                v.mul_(0.999).add_(p.grad**2, alpha=0.001)
                mean, square = m / (1 - 0.9 ** (n + 1)), v / (1 - 0.999 ** (n + 1))
                expected = old - size * (mean / (square.sqrt() + 1e-8) + decay * old)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)
    assert size < 0.2 * lr
