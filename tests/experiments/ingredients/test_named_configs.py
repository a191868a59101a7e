"""The papers' settings, key by key, as the texts print them."""

import gzip
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.ingredients.algorithm_table import ALGORITHMS, AlgorithmSettings
from experiments.ingredients.model import ModelSettings, build_backbone
from experiments.ingredients.named_configs import all_configs
from experiments.tracking import UserError
from experiments.train import ex

DOCS = Path(__file__).parents[3] / "docs"


def resolved(*names: str, **updates: Any) -> dict[str, Any]:
    """The configuration of a run that is created and not started."""
    return ex._create_run("train", updates, names, options={"--unobserved": True}).config


def has(config: dict[str, Any], **expected: Any) -> bool:
    return {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("benchmark", ["cifarfs", "fc100", "mini_imagenet", "tiered_imagenet"])
def test_yang(benchmark: str) -> None:
    small = benchmark in ("cifarfs", "fc100")
    ours, maml, anil = (resolved(f"yang_{benchmark}_{k}") for k in ("rm_metal", "maml", "anil"))
    assert has(
        ours, meta_lr=1e-4 if small else 1e-3, meta_optimizer="sgd", iterations=2000, meta_batch=32
    )
    assert has(ours["algorithm"], lr=0.1 if small else 0.05, steps=20, cg_steps=20,
               step="gradient", test_steps=20)  # fmt: skip
    assert has(ours["tasks"], name=benchmark, ways=5, shots=5)
    assert ours["model"]["hidden"] == (64 if small else 32)
    assert has(maml["algorithm"], steps=3, lr=0.5, test_scope="head")
    assert has(maml, meta_lr=1e-3 if small else 5e-3, meta_optimizer="adam")
    assert has(anil["algorithm"], steps=10 if small else 5, lr=0.1)
    assert has(anil, meta_lr=1e-4 if small else 1e-3, meta_optimizer="adam")


@pytest.mark.parametrize(("ways", "steps"), [(5, 16), (20, 25)])
@pytest.mark.parametrize("shots", [1, 5])
def test_rajeswaran(ways: int, steps: int, shots: int) -> None:
    """Not the paper's l2 of 2, which does not learn."""
    both = {"cg_steps": 5, "curvature": "gauss_newton", "damping": 0.0}
    gd, hf = {"step": "gradient", "steps": steps, "l2": 0.5}, {"step": "newton", "l2": 0.1}
    for kind, settings in (("gd", gd), ("hf", hf)):
        config = resolved(f"rajeswaran_omniglot_{ways}way_{shots}shot_{kind}")
        assert has(config["algorithm"], **both, **settings)
        assert has(config["tasks"], ways=ways, shots=shots, test_queries=shots)
    large = resolved("rajeswaran_mini_imagenet_gd")["algorithm"]
    assert has(large, l2=0.5, steps=10, cg_steps=5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_has_its_own_defaults(name: str) -> None:
    config = resolved(name)
    assert has({**config, **config["algorithm"]}, name=name, **ALGORITHMS[name][1])


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
    summary = settings.summary({"name": "maml"})
    assert summary["momentum"] == 0.9 and summary.docs["momentum"] == "of the inner optimiser"
    assert settings.summary({"name": "rm_metal"})["momentum"] is None
    for given, expected in {
        ("maml", -1): "a.momentum: expected a finite number of at least 0, got -1; try 0.9",
        ("maml", None): "a.momentum: expected a value for maml, got None; try 0.9",
        ("rm_metal", 0.5): "a.momentum: expected no such setting for ImplicitCGHead, got 0.5",
    }.items():
        with pytest.raises(UserError) as refused:
            settings.of({"name": given[0], "momentum": given[1]}, "a")
        assert expected in str(refused.value)


def test_variants_of_algorithm_1() -> None:
    released = resolved("as_released")
    assert (released["algorithm"]["l2"], released["meta_optimizer"]) == (0.0, "adam")
    assert resolved("paper")["meta_optimizer"] == "sgd"
    assert resolved("rm_metal") == resolved("ImplicitCGHead")
    assert resolved("rm_metal")["algorithm"]["name"] == "ImplicitCGHead"


def test_every_named_config_is_accepted() -> None:
    for name in all_configs():
        assert resolved(name)["seed"] is not None


def test_one_choice_of_algorithm_data_set_and_variant() -> None:
    """No name wins silently; one that refines another, or says the same again, is taken."""
    for names in ("rm_metal paper", "ImplicitCGHead rm_metal as_released", "smoke glyphs anil",
                  "cifarfs yang_cifarfs_rm_metal rm_metal paper"):  # fmt: skip
        assert resolved(*names.split())["seed"] is not None
    for names, key, two in (
        ("anil maml", "algorithm.name", "anil and maml"), ("paper anil", "algorithm.name", ""),
        ("cifarfs fc100", "tasks.name", "cifarfs and fc100"), ("smoke sine", "tasks.name", ""),
        ("yang_cifarfs_rm_metal as_released", "algorithm.variant", ""),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^{key}: expected one choice, got {two}"):
            resolved(*names.split())


@pytest.mark.parametrize("name", ["cifarfs", "fc100"])
def test_published_weights_are_those_of_their_config(name: str) -> None:
    """And the docs have the accuracy of the run that has left them, and of their test alone."""
    records, best, shown = DOCS / "records", f"{name}_best", (DOCS / "reproduction.md").read_text()
    lines = gzip.decompress((records / f"best_{name}.jsonl.gz").read_bytes()).splitlines()
    training, test, *_ = (json.loads(line)["runs"] for line in lines)
    assert (training["config"]["parameters"], test["config"]["iterations"]) == (None, 0)
    assert test["config"]["parameters"].endswith(f"{best}.pt")
    for run in (training, test):
        found = (100 * run["result"][f"test_{what}"] for what in ("accuracy", "half_width"))
        assert run["meta"]["named_configs"] == [best] and run["config"]["test_tasks"] == 2000
        assert "**{:.1f} ± {:.1f} %".format(*found) in shown
    file = records / f"{best}.pt"
    assert file.stat().st_size < 2**20
    saved = torch.load(file, weights_only=True)
    backbone, width = build_backbone((3, 32, 32), ModelSettings.of(all_configs()[best]["model"]))
    backbone.load_state_dict(saved["backbone"])
    assert saved["head"]["weight"].shape[1] == width
    assert all(bool(value.isfinite().all()) for value in saved["theta"])
