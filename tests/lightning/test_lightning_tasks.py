"""Whole networks, regression and several labels under a real Trainer."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2l_implicit import LBFGS, Direct, ImplicitMAML, Newton, UnsolvedWarning
from l2l_implicit.lightning import (
    EpisodicDataModule,
    LightningImplicitCGHead,
    LightningImplicitMAML,
)
from l2l_implicit.lightning.module import f1

import pytorch_lightning as pl  # isort: skip  (l2l_implicit first: it makes torchvision importable)

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*(many workers|no logger|LeafSpec|callbacks used).*"),
]
SHOTS, QUERIES, L2 = 8, 8, 0.1
SIZES = {"train_shots": SHOTS, "train_queries": QUERIES, "test_shots": SHOTS,
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


def trainer(folder: Path, **changes: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False,
             "enable_checkpointing": False, "accelerator": "cpu", "devices": 1, "max_epochs": 1,
             "default_root_dir": folder, "accumulate_grad_batches": 4}  # fmt: skip
    return pl.Trainer(**{**quiet, **changes})


def episodes(task: str, length: int, **changes: Any) -> EpisodicDataModule:
    tasks = Numbers(task, **changes)
    return EpisodicDataModule(tasks, tasks, tasks, epoch_length=length, test_length=40)


METRICS = {"regression": "absolute_error", "multilabel": "f1"}
BETTER = {"regression": 0.9, "multilabel": 1.05}


@pytest.mark.parametrize("task", METRICS)
def test_features_for_a_head_are_learned(tmp_path: Path, task: str) -> None:
    """Loss and metric of the task are better than before, and have its names."""
    module = LightningImplicitCGHead(body(), nn.Linear(6, 2), task=task, **SIZES)
    seen: set[str] = set()

    class Names(pl.Callback):
        def on_train_end(self, run: pl.Trainer, _: Any) -> None:
            seen.update(run.callback_metrics)

    run = trainer(tmp_path, callbacks=[Names()])
    data, name = episodes(task, 400), METRICS[task]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnsolvedWarning)
        (before,) = run.test(module, data, verbose=False)
        run.fit(module, data)
        (after,) = run.test(module, data, verbose=False)
    assert set(after) == {"test_loss", f"test_{name}"}
    assert {"train_loss", f"train_{name}", "valid_loss", f"valid_{name}"} == seen
    assert after["test_loss"] < 0.9 * before["test_loss"]
    ratio = after[f"test_{name}"] / before[f"test_{name}"]
    assert ratio < BETTER[task] if task == "regression" else ratio > BETTER[task]


def test_a_whole_network_is_learned(tmp_path: Path) -> None:
    network = nn.Sequential(body(), nn.Linear(6, 1))
    module = LightningImplicitMAML(
        network, task="regression", **SIZES, inner=LBFGS(), max_error=1e9
    )
    run, data = trainer(tmp_path), episodes("regression", 80, alone=True)
    (before,) = run.test(module, data, verbose=False)
    run.fit(module, data)
    (after,) = run.test(module, data, verbose=False)
    assert after["test_loss"] < 0.8 * before["test_loss"]
    assert after["test_absolute_error"] < 0.9 * before["test_absolute_error"]
    assert module.model.diagnostics.hypergradients == 80


# Hypergradients, by computations that share no code with the module's.


def test_regression_by_the_normal_equations() -> None:
    features, (x, y) = body(), Numbers("regression").sample()
    module = LightningImplicitCGHead(features, nn.Linear(6, 2), task="regression", **SIZES)
    loss, metric = module.meta_learn((x, y), 0, 5, SHOTS, QUERIES)
    found = torch.autograd.grad(loss, [*features.parameters()])
    h = features(x)
    ones = torch.cat([h, torch.ones(len(h), 1)], 1)
    s, mean = ones[:SHOTS], 2 / y[:SHOTS].numel()
    w = torch.linalg.solve(mean * s.T @ s + L2 * torch.eye(7), mean * s.T @ y[:SHOTS])
    left = ones[SHOTS:] @ w - y[SHOTS:]
    expected = torch.autograd.grad(left.square().mean(), [*features.parameters()])
    assert float(loss) == pytest.approx(float(left.square().mean()), rel=1e-9)
    assert float(metric) == pytest.approx(float(left.abs().mean()), rel=1e-9)
    assert oracles.relative_error(found, expected) < 1e-8


def test_several_labels_by_the_implicit_function_theorem() -> None:
    theta, (x, y) = torch.randn(3, 6), Numbers("multilabel").sample()

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(theta.clone())

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.theta)

    def loss(phi: Tensor, theta: Tensor, part: slice) -> Tensor:
        z = oracles.linear(phi, torch.tanh(x[part] @ theta), 2)
        signs = 2.0 * y[part] - 1.0
        return torch.log1p(torch.exp(-signs * z)).mean()

    def inner(phi: Tensor, theta: Tensor) -> Tensor:
        return loss(phi, theta, slice(SHOTS)) + 0.5 * L2 * phi.square().sum()

    def outer(phi: Tensor, theta: Tensor) -> Tensor:
        return loss(phi, theta, slice(SHOTS, None))

    phi = oracles.polish(inner, torch.zeros(14), [theta])
    (expected,) = oracles.implicit(inner, outer, [theta], phi)
    module = LightningImplicitCGHead(
        Features(), nn.Linear(6, 2), task="multilabel", **SIZES, inner=Newton(tol=1e-12),
        linear=Direct(),
    )  # fmt: skip
    found, metric = module.meta_learn((x, y), 0, 5, SHOTS, QUERIES)
    found.backward()
    assert float(found) == pytest.approx(float(outer(phi, theta)), rel=1e-9)
    assert oracles.relative_error([module.features.theta.grad], [expected]) < 1e-6
    guessed = (oracles.linear(phi, torch.tanh(x[SHOTS:] @ theta), 2) > 0).flatten().tolist()
    there = [bool(v) for v in y[SHOTS:].flatten()]
    hits = sum(a and b for a, b in zip(guessed, there, strict=True))
    assert float(metric) == pytest.approx(2 * hits / (sum(guessed) + sum(there)))


def test_accumulated_batches_of_a_whole_network_are_the_meta_batch(tmp_path: Path) -> None:
    """Against learn2learn's loop with `ImplicitMAML` and no Lightning."""
    settings = {"l2": 2.0, "inner": LBFGS(), "linear": Direct()}
    data = episodes("regression", 4)
    tasks = [data.train_dataloader().dataset[i] for i in range(4)]
    module = LightningImplicitMAML(
        nn.Sequential(body(), nn.Linear(6, 2)), F.mse_loss, task="regression",
        **{**SIZES, **settings},
    )  # fmt: skip
    torch.manual_seed(0)
    network = nn.Sequential(body(), nn.Linear(6, 2))
    network.load_state_dict(module.model.module.state_dict())
    trainer(tmp_path, limit_val_batches=0).fit(module, data)
    maml = ImplicitMAML(network, lr=0.1, **settings)
    optimizer = torch.optim.Adam(maml.parameters(), lr=0.03)
    for x, y in tasks:
        learner = maml.clone()
        learner.adapt(lambda n=learner, x=x, y=y: F.mse_loss(n(x[:SHOTS]), y[:SHOTS]), steps=20)
        (0.25 * F.mse_loss(learner(x[SHOTS:]), y[SHOTS:])).backward()
    optimizer.step()
    for a, b in zip(module.model.parameters(), maml.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)


# Around it.


def test_a_checkpoint_keeps_the_task_and_the_command_line_has_it(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(3, 1))
    module = LightningImplicitMAML(network, task="regression", **{**SIZES, "l2": 0.7})
    run = trainer(tmp_path, limit_train_batches=4, limit_val_batches=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsolvedWarning)
        run.fit(module, episodes("regression", 4, alone=True))
    run.save_checkpoint(tmp_path / "end.ckpt")
    loaded = LightningImplicitMAML.load_from_checkpoint(
        tmp_path / "end.ckpt", model=nn.Sequential(nn.Linear(3, 1)), weights_only=True
    )
    assert loaded.hparams.task == "regression" and loaded.model.l2 == 0.7
    assert isinstance(loaded.model, ImplicitMAML) and isinstance(loaded.loss, nn.MSELoss)
    parser = LightningImplicitMAML.add_model_specific_args(argparse.ArgumentParser(add_help=False))
    made = LightningImplicitMAML(network, **vars(parser.parse_args(["--task", "multilabel"])))
    assert (made.model.l2, made.model.anchor, made.hparams.task) == (0.5, "init", "multilabel")


def test_metrics() -> None:
    logits, there = torch.tensor([[1.0, -1.0], [2.0, 3.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert float(f1(logits, there)) == pytest.approx(2 * 2 / (3 + 3))
    assert float(f1(-torch.ones(2, 2), torch.zeros(2, 2))) == 0.0


def test_what_does_not_fit_is_one_line() -> None:
    with pytest.raises(ValueError, match="^task: expected one of 'classification'.*'multilabel'"):
        LightningImplicitMAML(nn.Linear(3, 1), task="multi-label")
    module = LightningImplicitMAML(nn.Linear(3, 2), task="regression", l2=5.0)
    x, y = Numbers("regression").sample()
    with pytest.raises(ValueError, match=r"^expected more than shots=16 samples [^\n]*$"):
        module.meta_learn((x, y), 0, 5, 16, 1)
    with pytest.raises(ValueError, match=r"^labels: expected one for each [^\n]*$"):
        module.meta_learn((x, y[:, 0]), 0, 5, 8, 8)
