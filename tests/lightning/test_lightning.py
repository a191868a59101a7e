"""`LightningImplicitCGHead`, `LightningImplicitMAML` and the data module under a real Trainer."""

import argparse
import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2l_implicit import CG, LBFGS, Direct, ImplicitCGHead, ImplicitMAML, Newton, UnsolvedWarning
from l2l_implicit.lightning import (
    EpisodicDataModule,
    LightningImplicitCGHead,
    LightningImplicitMAML,
)
from l2l_implicit.lightning.data import EpisodeNumbers
from l2l_implicit.lightning.module import f1
from l2l_implicit.tasks import get_tasksets, split_support_query

import pytorch_lightning as pl  # isort: skip  (l2l_implicit first: it makes torchvision importable)
from learn2learn.algorithms import LightningANIL, LightningEpisodicModule  # isort: skip
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint  # isort: skip
from pytorch_lightning.loggers import CSVLogger  # isort: skip

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*(many workers|no logger|LeafSpec|callbacks used).*"),
]
SIZES = {"train_ways": 3, "train_shots": 2, "train_queries": 2,
         "test_ways": 3, "test_shots": 2, "test_queries": 2}  # fmt: skip


class Clusters:
    """A task set: three classes around random centres, two support and two query samples each."""

    def __init__(self, noise: float = 0.5) -> None:
        self._noise = noise

    def sample(self) -> tuple[Tensor, Tensor]:
        labels = torch.arange(3).repeat_interleave(4)
        return torch.randn(3, 6)[labels] + self._noise * torch.randn(12, 6), labels


def features() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))


def module(**changes: Any) -> LightningImplicitCGHead:
    body = features()
    return LightningImplicitCGHead(body, nn.Linear(4, 3), **{**SIZES, "lr": 0.01, **changes})


def data(noise: float = 0.5, **changes: Any) -> EpisodicDataModule:
    return EpisodicDataModule(Clusters(noise), **{"epoch_length": 6, **changes})


def trainer(folder: Path, **changes: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False,
             "enable_checkpointing": False, "accelerator": "cpu", "devices": 1, "max_epochs": 2,
             "default_root_dir": folder, "accumulate_grad_batches": 3,
             "log_every_n_steps": 1}  # fmt: skip
    return pl.Trainer(**{**quiet, **changes})


def state(of: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in of.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def by_hand(
    parent: Any, body: nn.Module, tasks: Any, split: Callable[..., Any], loss: Any, lr: float,
    every: int,
) -> None:  # fmt: skip
    """Outer steps with learn2learn's contract and no Lightning."""
    optimizer = torch.optim.Adam([*body.parameters(), *parent.parameters()], lr=lr)
    for i, (inputs, labels) in enumerate(tasks, start=1):
        learner = parent.clone()
        (x, y), (x_query, y_query) = split(body(inputs), labels)
        learner.adapt(lambda n=learner, x=x, y=y: loss(n(x), y), steps=20)
        (loss(learner(x_query), y_query) / every).backward()
        if i % every == 0:
            optimizer.step()
            optimizer.zero_grad()


def test_accumulated_batches_are_the_meta_batch(tmp_path: Path) -> None:
    episodes, trained, body = data(), module(inner=Newton()), features()
    tasks = [episodes.train_dataloader().dataset[i] for i in range(12)]
    trainer(tmp_path).fit(trained, episodes)
    head, split = ImplicitCGHead(nn.Linear(4, 3), lr=0.1), partial(split_support_query, shots=2)
    by_hand(head, body, tasks, split, F.cross_entropy, 0.01, 3)
    states = trained.features.state_dict(), body.state_dict()
    torch.testing.assert_close(*states, atol=1e-6, rtol=0)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_fit_validate_and_test(tmp_path: Path, inference_mode: bool) -> None:
    trained, episodes = module(), data(noise=0.02)  # far apart: what adapts gets nearly all right
    run = trainer(tmp_path, inference_mode=inference_mode, logger=CSVLogger(tmp_path))
    run.fit(trained, episodes)
    before = state(trained)
    (validated,) = run.validate(trained, episodes, verbose=False)
    (tested,) = run.test(trained, episodes, verbose=False)
    assert same(before, state(trained))
    other = trainer(tmp_path, inference_mode=not inference_mode)
    assert other.test(trained, data(noise=0.02), verbose=False) == [tested]
    assert 0.4 < validated["valid_accuracy"] <= 1 and 0.4 < tested["test_accuracy"] <= 1
    assert "valid_accuracy" in (Path(run.logger.log_dir) / "metrics.csv").read_text()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("saved_after", [2, 3])  # outer steps: an epoch's end, and within one
def test_a_resumed_run_ends_as_if_undisturbed(
    tmp_path: Path, saved_after: int, workers: int
) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=saved_after, save_top_k=-1)
    whole = module()
    run = trainer(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=[keep])
    run.fit(whole, data())
    (path,) = tmp_path.glob(f"*step={saved_after}.ckpt")
    resumed = module()
    with warnings.catch_warnings(record=True) as said:
        trainer(tmp_path, max_epochs=3).fit(
            resumed, data(num_workers=workers), ckpt_path=path, weights_only=True
        )
    assert not [w for w in said if "not resumable" in str(w.message)]
    assert same(state(whole), state(resumed))


def test_a_learned_regulariser_moves_until_training_stops_early(tmp_path: Path) -> None:
    """And every inner problem is solved."""
    l2 = nn.Parameter(torch.tensor(0.1))
    trained = module(l2=l2)
    stop = EarlyStopping("valid_accuracy", mode="max", patience=1, min_delta=2.0)
    run = trainer(tmp_path, max_epochs=50, callbacks=[stop])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnsolvedWarning)
        run.fit(trained, data())
    found = trained.classifier.diagnostics
    assert run.current_epoch == 2 and float(l2.detach()) != 0.1
    assert (found.hypergradients, found.unsolved) == (12, 0)


def test_arguments_reach_the_head_or_are_an_error() -> None:
    made = module(inner=LBFGS(), linear=CG(steps=7)).classifier
    assert (made.inner, made.linear) == (LBFGS(), CG(steps=7))
    assert issubclass(LightningImplicitCGHead, LightningANIL | LightningEpisodicModule)
    wrong: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: module(max_eror=0.1), TypeError, "did you mean 'max_error'"),
        (lambda: module(max_error=0.0), ValueError, "max_error"),
        (lambda: module(cg_steps=5), TypeError, r"cg_steps: expected linear=CG\(steps=...\)"),
        (lambda: EpisodicDataModule([1, 2]), TypeError, "sample"),
        (lambda: data(epoch_length=0), ValueError, "epoch_length"),
    ]
    for make, error, message in wrong:
        with pytest.raises(error, match=message):
            make()


class Seen(pl.Callback):
    """The tasks' sums as they come, by stage."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.validation: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.train.append(float(batch[0].sum()))

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        self.validation.append(float(batch[0].sum()))


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_bring_new_tasks_and_validations_the_same(tmp_path: Path, workers: int) -> None:
    seen = Seen()
    run = trainer(tmp_path, callbacks=[seen], num_sanity_val_steps=0)
    run.fit(module(), data(num_workers=workers))
    episodes = data().train_dataloader().dataset
    assert seen.train == [float(episodes[i][0].sum()) for i in range(12)]
    assert seen.validation[:6] == seen.validation[6:] and len(set(seen.validation)) == 6
    assert not set(seen.train) & set(seen.validation)


def test_devices_share_out_the_tasks_of_one_process() -> None:
    episodes = data().train_dataloader().dataset
    for done, expected in (((0, 0), [[0, 2, 4], [1, 3, 5]]), ((4, 1), [[8, 10], [9, 11]])):
        shares = [list(EpisodeNumbers(episodes, 2, rank, lambda d=done: d)) for rank in range(2)]
        assert shares == expected


def test_tasks_are_those_of_their_numbers_whoever_draws_them() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    alone, helped = (list(data(num_workers=n).train_dataloader()) for n in (0, 2))
    assert torch.equal(torch.rand(3), expected)  # no random numbers are disturbed
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, helped, strict=True))


def test_tasks_of_a_finite_set_too() -> None:
    """Whoever draws them first, and whatever was drawn before."""
    def drawn(workers: int, skip: int = 0) -> list[Tensor]:
        sets = get_tasksets("glyphs", num_tasks=3, level="clean", train_ways=2, train_samples=2)
        for _ in range(skip):
            sets.train.sample()
        tasks = EpisodicDataModule(sets.train, epoch_length=8, num_workers=workers)
        return [x for x, _ in tasks.train_dataloader()]

    alone, helped, later = drawn(0), drawn(2), drawn(0, skip=2)
    assert same(alone, helped) and same(alone, later)
    assert len({x.numpy().tobytes() for x in alone}) == 3
    own = Numbers("regression")
    own.num_tasks = 3  # of a set that is not learn2learn's it means whatever it means there
    assert len(list(EpisodicDataModule(own, epoch_length=2).train_dataloader())) == 2


# Whole networks, regression and several labels.


SHOTS, QUERIES, L2 = 8, 8, 0.1
FOUR = {"max_epochs": 1, "accumulate_grad_batches": 4}
ALIKE = {"train_shots": SHOTS, "train_queries": QUERIES, "test_shots": SHOTS,
         "test_queries": QUERIES, "l2": L2, "lr": 0.03}  # fmt: skip


class Numbers:
    """Tasks whose labels are made of two features of three inputs, each task with its own map.

    With ``alone`` there is one label, most of which all tasks share.
    """

    def __init__(self, task: str, alone: bool = False) -> None:
        self._task, self._alone = task, alone

    def sample(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(SHOTS + QUERIES, 3)
        h = torch.stack([x[:, 0] * x[:, 1], x[:, 2].square() - 1.0], 1)
        y = h @ torch.randn(2, 2)
        if self._task == "multilabel":
            return x, (y > 0).long()
        return x, 3.0 * torch.tanh(x[:, 0] - x[:, 1]) + 0.2 * y[:, 0] if self._alone else y


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 6), nn.Tanh())


def episodes(task: str, length: int, **changes: Any) -> EpisodicDataModule:
    tasks = Numbers(task, **changes)
    return EpisodicDataModule(tasks, tasks, tasks, epoch_length=length, test_length=40)


@pytest.mark.parametrize("task", ["regression", "multilabel"])
def test_losses_metrics_and_hypergradients_are_those_of_the_learner(task: str) -> None:
    features, (x, y) = body(), Numbers(task).sample()
    module = LightningImplicitCGHead(features, nn.Linear(6, 2), task=task, **ALIKE)
    loss, metric = module.meta_learn((x, y), 0, 5, SHOTS, QUERIES)
    found = torch.autograd.grad(loss, [*features.parameters()])
    head, h, there = module.classifier.module, features(x), y.double()[SHOTS:]
    own = F.mse_loss if task == "regression" else F.binary_cross_entropy_with_logits
    learner = ImplicitCGHead(head, 0.1, l2=L2).clone()
    learner.adapt(lambda: own(learner(h[:SHOTS]), y.double()[:SHOTS]), steps=20)
    z = learner(h[SHOTS:])
    expected = torch.autograd.grad(own(z, there), [*features.parameters()])
    assert oracles.relative_error([loss, *found], [own(z, there), *expected]) < 1e-9
    hits, said = ((z > 0) & (there > 0)).sum(), (z > 0).sum() + (there > 0).sum()
    right = (z - there).abs().mean() if task == "regression" else 2 * hits / said
    assert float(metric) == pytest.approx(float(right), rel=1e-9)
    assert float(f1(-torch.ones(2, 2), torch.zeros(2, 2))) == 0.0


def test_accumulated_batches_of_a_whole_network_are_the_meta_batch(tmp_path: Path) -> None:
    settings = {"l2": 2.0, "inner": LBFGS(), "linear": Direct()}
    data, network = episodes("regression", 4), nn.Sequential(body(), nn.Linear(6, 2))
    tasks = [data.train_dataloader().dataset[i] for i in range(4)]
    maml = ImplicitMAML(copy.deepcopy(network), lr=0.1, **settings)
    given = {**ALIKE, **settings}
    module = LightningImplicitMAML(network, F.mse_loss, task="regression", **given)
    trainer(tmp_path, **FOUR, limit_val_batches=0).fit(module, data)

    def split(x: Tensor, y: Tensor) -> Any:
        return (x[:SHOTS], y[:SHOTS]), (x[SHOTS:], y[SHOTS:])

    by_hand(maml, nn.Identity(), tasks, split, F.mse_loss, 0.03, 4)
    ends = [*module.model.parameters()], [*maml.module.parameters()]
    torch.testing.assert_close(*ends, atol=1e-8, rtol=0)


@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_keeps_settings_and_task_and_the_command_line_has_them(
    tmp_path: Path, whole: bool
) -> None:
    cls = LightningImplicitMAML if whole else LightningImplicitCGHead
    given = {"model": nn.Linear(3, 1)} if whole else {
        "features": nn.Linear(3, 6), "classifier": nn.Linear(6, 1)}  # fmt: skip
    settings = {"l2": 0.7, "max_error": 1e9, "adaptation_steps": 9}
    trained = cls(**given, task="regression", **{**ALIKE, **settings})
    run = trainer(tmp_path, **FOUR, limit_train_batches=4, limit_val_batches=0)
    run.fit(trained, episodes("regression", 4, alone=True))
    assert {"train_loss", "train_absolute_error"} <= {*run.callback_metrics}
    run.save_checkpoint(tmp_path / "end.ckpt")
    fresh = {name: copy.deepcopy(part) for name, part in given.items()}
    loaded = cls.load_from_checkpoint(tmp_path / "end.ckpt", **fresh, weights_only=True)
    assert same(state(trained), state(loaded)) and isinstance(loaded.loss, nn.MSELoss)
    head = loaded.model if whole else loaded.classifier
    assert (head.l2, head.max_error, loaded.adaptation_steps) == (0.7, 1e9, 9)
    assert loaded.hparams.task == "regression" and loaded.hparams.train_shots == SHOTS
    assert isinstance(head, ImplicitMAML) == whole
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--dataset", default="omniglot")
    parser = cls.add_model_specific_args(parent)
    words = ["--l2", "0.25", "--train_ways", "3", "--test_ways", "3", "--task", "multilabel"]
    made = cls(**given, **vars(parser.parse_args(words)))
    head = made.model if whole else made.classifier
    assert (head.l2, made.train_ways, made.hparams.task) == (0.25, 3, "multilabel")
    assert (head.anchor, made.adaptation_steps) == ("init" if whole else "zero", 20)


def test_what_does_not_fit_is_one_line() -> None:
    with pytest.raises(ValueError, match="^task: expected one of 'classification'.*'multilabel'"):
        LightningImplicitMAML(nn.Linear(3, 1), task="multi-label")
    module = LightningImplicitMAML(nn.Linear(3, 2), task="regression", l2=5.0)
    x, y = Numbers("regression").sample()
    with pytest.raises(ValueError, match=r"^expected more than shots=16 samples [^\n]*$"):
        module.meta_learn((x, y), 0, 5, 16, 1)
    with pytest.raises(ValueError, match=r"^labels: expected one for each [^\n]*$"):
        module.meta_learn((x, y[:, 0]), 0, 5, 8, 8)
    module = LightningImplicitMAML(nn.Linear(3, 2), task="multilabel", l2=5.0)
    with pytest.raises(ValueError, match=r"^labels: expected 0 or 1 [^\n]*got -1 to 1; [^\n]*$"):
        module.meta_learn((x, y.sign()), 0, 5, 8, 8)
