"""`LightningImplicitCGHead` and `EpisodicDataModule` under a real Trainer."""

from __future__ import annotations

import argparse
import doctest
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2l_implicit import CG, LBFGS, ImplicitCGHead, Newton, UnsolvedWarning
from l2l_implicit.lightning import EpisodicDataModule, LightningImplicitCGHead
from l2l_implicit.lightning.data import Done, EpisodeNumbers
from l2l_implicit.tasks import split_support_query

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


def by_hand(tasks: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Outer steps of three tasks with learn2learn's contract and no Lightning."""
    body = features()
    head, mean = ImplicitCGHead(nn.Linear(4, 3), lr=0.1), 1.0 / 3
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=0.01)
    for i, (inputs, labels) in enumerate(tasks, start=1):
        learner = head.clone()
        (x, y), (x_query, y_query) = split_support_query(body(inputs), labels, 2)
        for _ in range(20):
            learner.adapt(nn.functional.cross_entropy(learner(x), y))
        (mean * nn.functional.cross_entropy(learner(x_query), y_query)).backward()
        if i % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
    return body


def test_accumulated_batches_are_the_meta_batch(tmp_path: Path) -> None:
    episodes = data()
    tasks = [episodes.train_dataloader().dataset[i] for i in range(12)]
    trained = module(inner=Newton())
    trainer(tmp_path).fit(trained, episodes)
    expected = by_hand(tasks)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(trained.features.state_dict()[name], value, atol=1e-6, rtol=0)


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


def test_validation_does_not_disturb_training(tmp_path: Path) -> None:
    ends = []
    for limit in (0, 4):
        trained = module()
        trainer(tmp_path, limit_val_batches=limit).fit(trained, data())
        ends.append(state(trained))
    assert same(*ends)


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


def test_a_checkpoint_knows_its_settings(tmp_path: Path) -> None:
    trained = module(l2=0.3, max_error=0.5, adaptation_steps=9)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(trained, data())
    run.save_checkpoint(tmp_path / "end.ckpt")
    loaded = LightningImplicitCGHead.load_from_checkpoint(
        tmp_path / "end.ckpt", features=features(), classifier=nn.Linear(4, 3), weights_only=True
    )
    assert same(state(trained), state(loaded))
    head = loaded.classifier
    assert (head.l2, head.max_error, loaded.adaptation_steps) == (0.3, 0.5, 9)
    assert loaded.hparams.l2 == 0.3 and loaded.hparams.train_shots == 2


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


def test_the_command_line_of_learn2learns_example() -> None:
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--dataset", default="omniglot")
    parser = LightningImplicitCGHead.add_model_specific_args(parent)
    words = ["--l2", "0.5", "--train_ways", "3", "--test_ways", "3"]
    made = LightningImplicitCGHead(features(), nn.Linear(4, 3), **vars(parser.parse_args(words)))
    assert (made.classifier.l2, made.train_ways, made.adaptation_steps) == (0.5, 3, 20)


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


# The data module.


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
    for done, expected in ((Done(0, 0), [[0, 2, 4], [1, 3, 5]]), (Done(4, 1), [[8, 10], [9, 11]])):
        shares = [list(EpisodeNumbers(episodes, 2, rank, lambda d=done: d)) for rank in range(2)]
        assert shares == expected


def test_tasks_are_those_of_their_numbers_whoever_draws_them() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    alone, helped = (list(data(num_workers=n).train_dataloader()) for n in (0, 2))
    assert torch.equal(torch.rand(3), expected)  # no random numbers are disturbed
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, helped, strict=True))


def test_examples() -> None:
    for name in ("module", "data"):
        found = importlib.import_module(f"l2l_implicit.lightning.{name}")
        assert doctest.testmod(found).failed == 0
