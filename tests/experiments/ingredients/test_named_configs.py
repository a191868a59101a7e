"""The papers' settings, key by key, as the texts print them."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from experiments.ingredients.algorithm_table import ALGORITHMS, AlgorithmSettings
from experiments.ingredients.named_configs import all_configs
from experiments.tracking import UserError
from experiments.tracking.config import ModelConfig
from experiments.train import ex

SMALL, LARGE = ("cifarfs", "fc100"), ("mini_imagenet", "tiered_imagenet")


def resolved(*names: str, **updates: Any) -> dict[str, Any]:
    """The configuration of a run that is created and not started."""
    run = ex._create_run("train", updates, names, options={"--unobserved": True})
    return run.config


@pytest.mark.parametrize("benchmark", SMALL + LARGE)
def test_yang_algorithm_1(benchmark: str) -> None:
    config = resolved(f"yang_{benchmark}_rm_metal")
    small = benchmark in SMALL
    assert config["meta_lr"] == (1e-4 if small else 1e-3)
    assert config["algorithm"]["lr"] == (0.1 if small else 0.05)
    assert config["algorithm"]["steps"] == config["algorithm"]["cg_steps"] == 20
    assert config["algorithm"]["step"] == "gradient" and config["meta_optimizer"] == "sgd"
    assert config["model"]["hidden"] == (64 if small else 32)
    assert (config["meta_batch"], config["iterations"]) == (32, 2000)
    assert [config["tasks"][key] for key in ("name", "ways", "shots")] == [benchmark, 5, 5]
    assert config["algorithm"]["test_steps"] == 20


@pytest.mark.parametrize("benchmark", SMALL + LARGE)
def test_yang_baselines(benchmark: str) -> None:
    small = benchmark in SMALL
    maml, anil = (resolved(f"yang_{benchmark}_{name}") for name in ("maml", "anil"))
    assert (maml["algorithm"]["steps"], maml["algorithm"]["lr"]) == (3, 0.5)
    assert maml["meta_lr"] == (1e-3 if small else 5e-3)
    assert (anil["algorithm"]["steps"], anil["meta_lr"]) == ((10, 1e-4) if small else (5, 1e-3))
    assert anil["algorithm"]["lr"] == 0.1
    assert maml["meta_optimizer"] == anil["meta_optimizer"] == "adam"
    assert maml["algorithm"]["test_scope"] == "head"


@pytest.mark.parametrize(("ways", "steps"), [(5, 16), (20, 25)])
@pytest.mark.parametrize("shots", [1, 5])
def test_rajeswaran_omniglot(ways: int, steps: int, shots: int) -> None:
    gd, hf = (resolved(f"rajeswaran_omniglot_{ways}way_{shots}shot_{k}") for k in ("gd", "hf"))
    for config in (gd, hf):
        assert config["algorithm"]["cg_steps"] == 5
        assert config["algorithm"]["curvature"] == "gauss_newton"
        assert config["algorithm"]["damping"] == 0.0
        assert (config["tasks"]["ways"], config["tasks"]["shots"]) == (ways, shots)
        assert config["tasks"]["test_queries"] == shots
    assert gd["algorithm"]["steps"] == steps
    # Not the paper's 2, which does not learn.
    assert (gd["algorithm"]["l2"], hf["algorithm"]["l2"]) == (0.5, 0.1)
    assert (gd["algorithm"]["step"], hf["algorithm"]["step"]) == ("gradient", "newton")


def test_rajeswaran_mini_imagenet() -> None:
    config = resolved("rajeswaran_mini_imagenet_gd")["algorithm"]
    assert (config["l2"], config["steps"], config["cg_steps"]) == (0.5, 10, 5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_has_its_own_defaults(name: str) -> None:
    config = resolved(name)
    assert config["algorithm"]["name"] == name
    found = {**config["algorithm"], "meta_lr": config["meta_lr"],
             "meta_optimizer": config["meta_optimizer"]}
    _, own = ALGORITHMS[name]
    assert {key: found[key] for key in own} == own


def test_a_new_setting_of_an_algorithm_is_one_line(tmp_path: Path) -> None:
    """Its default where an algorithm has it, its type, its words; refused where none has it."""
    text = Path(inspect.getfile(AlgorithmSettings)).read_text()
    line = "    momentum: NotNegative = own(unrolled=0.9)  # of the inner optimiser\n"
    before = "    steps: Count = "
    assert text.count(before) == 1
    (tmp_path / "with_momentum.py").write_text(text.replace(before, line + before))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        settings = importlib.import_module("with_momentum").AlgorithmSettings
    summary = ModelConfig(settings)({"name": "maml"})
    assert summary["momentum"] == 0.9 and summary.docs["momentum"] == "of the inner optimiser"
    assert ModelConfig(settings)({"name": "rm_metal"})["momentum"] is None
    for given, expected in {
        ("maml", -1): "a.momentum: expected a finite number of at least 0, got -1; try 0.9",
        ("maml", None): "a.momentum: expected a value for maml, got None; try 0.9",
        ("rm_metal", 0.5): "a.momentum: expected no such setting for rm_metal, got 0.5",
    }.items():
        with pytest.raises(UserError) as refused:
            settings.of({"name": given[0], "momentum": given[1]}, "a")
        assert expected in str(refused.value)


def test_a_key_beats_a_named_config_in_either_order() -> None:
    assert resolved("anil", **{"algorithm.steps": 7})["algorithm"]["steps"] == 7


def test_variants_of_algorithm_1() -> None:
    assert resolved("as_released")["algorithm"]["l2"] == 0.0
    assert resolved("as_released")["meta_optimizer"] == "adam"
    assert resolved("paper")["meta_optimizer"] == "sgd"
    assert resolved("rm_metal")["algorithm"]["step"] == "newton"


def test_every_named_config_is_accepted() -> None:
    for name in all_configs():
        assert resolved(name)["seed"] is not None
