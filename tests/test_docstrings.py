"""Every example in a docstring of the package runs and gives what it shows."""

import doctest
import importlib
import pkgutil

import pytest

import l2l_implicit

# Lightning is an extra: tests/test_lightning.py runs the examples of what needs it.
MODULES = [
    module.name
    for module in pkgutil.walk_packages(l2l_implicit.__path__, "l2l_implicit.")
    if not module.name.startswith("l2l_implicit.lightning")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), extraglobs={})
    assert result.failed == 0


def test_the_public_classes_have_examples() -> None:
    finder = doctest.DocTestFinder()
    for name in ("ImplicitCGHead", "ImplicitMAML", "conjugate_gradient"):
        found = finder.find(getattr(l2l_implicit, name), name, globs={})
        assert any(test.examples for test in found), name
