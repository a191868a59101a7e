"""The examples in docstrings run and give what they show; everything public has one."""

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import l2l_implicit

MODULES = [module.name for module in pkgutil.walk_packages(l2l_implicit.__path__, "l2l_implicit.")]
PACKAGES = ("", ".baselines", ".lightning", ".tasks", ".distributed", ".per_task_norm")


def public(package: str) -> Iterator[Any]:
    """The functions and classes that ``package`` offers."""
    module = importlib.import_module(f"l2l_implicit{package}")
    own = [name for name in vars(module) if not name.startswith("_")]
    for name in getattr(module, "__all__", own):
        value = getattr(module, name)
        ours = getattr(value, "__module__", "").startswith("l2l_implicit")
        if ours and hasattr(value, "__qualname__"):
            yield value


def has_example(value: Any) -> bool:
    """Whether an example of ``value`` is among those that are run."""
    module = importlib.import_module(value.__module__)
    name = f"{value.__module__}.{value.__qualname__}"
    return any(test.name == name and test.examples for test in doctest.DocTestFinder().find(module))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    if name == "l2l_implicit.baselines.unrolled":
        pytest.importorskip("higher", reason="the extra baselines is not installed")
    if name.startswith("l2l_implicit.lightning"):
        pytest.importorskip("pytorch_lightning", reason="the extra lightning is not installed")
    if name == "l2l_implicit.mixed_precision" and not hasattr(torch.amp, "GradScaler"):
        pytest.skip("this torch has no torch.amp.GradScaler")  # from 2.3 on
    result = doctest.testmod(importlib.import_module(name), extraglobs={})
    assert result.failed == 0


@pytest.mark.parametrize("package", PACKAGES)
def test_everything_public_has_an_example(package: str) -> None:
    if package == ".lightning":
        pytest.importorskip("pytorch_lightning", reason="the extra lightning is not installed")
    offered = list(public(package))
    assert offered
    assert not [value.__qualname__ for value in offered if not has_example(value)]
