"""Every command of the README and of docs/ is run by a test, checked by a dry run, or says why not.

Checked means: the program has read the arguments, and found every name, key and type of them right;
what the command then does is not seen here.
"""

import importlib
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from docs_blocks import ROOT, blocks, commands, pages

import experiments.sweep
from experiments.benchmark.cases import select
from experiments.sweeps.definition import parse_settings
from experiments.sweeps.plan import find_sweep, make_plan
from experiments.tracking import UserError

SHELL = ("sh", "bash", "")  # a block without a language holds commands here
FOLLOWED = ROOT / "docs" / "tutorials"  # tests/project/test_docs_tutorials.py runs these
TEMPLATE = re.compile(r"<\w+>")  # such as <benchmark>: to be filled in
INLINE = re.compile(r"`(python -m experiments\.(?!NAME)[^`]+)`")


def stated() -> Iterator[tuple[str, str]]:
    """Every command line in a block of commands, but for the tutorials', and why it is not run."""
    for page in pages():
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.language in SHELL and not page.is_relative_to(FOLLOWED):
                yield from ((line, block.reason) for line in commands(block.text))


def in_prose() -> Iterator[str]:
    """Every experiment that a sentence starts: `python -m experiments...` between backticks."""
    for page in pages():
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        yield from (" ".join(line.split()) for line in INLINE.findall(text))


def check_experiment(experiment: Any, arguments: list[str]) -> None:
    """Sacred's own reading of the arguments, every name and type checked, and no run."""
    asked = [word for word in arguments if not word.startswith("resume=")]
    if "-m" in asked:
        del asked[asked.index("-m") : asked.index("-m") + 2]
    if not {"print_config", "print_named_configs"} & set(asked):
        asked = [word for word in asked if word != "evaluate"]  # it has the same settings
        asked.insert(asked.index("with") if "with" in asked else len(asked), "print_config")
    assert experiment.run_commandline([experiment.path, *asked]) is not None


def check(line: str) -> None:
    """Fails where the program that ``line`` starts would refuse it before it begins."""
    words = shlex.split(line.partition(" > ")[0])
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    assert words[:2] == ["python", "-m"], (
        f"expected `python -m experiments...` or a comment with the reason why not, got {line!r}"
    )
    module, arguments = words[2], words[3:]
    if module == "experiments.sweep":
        options = experiments.sweep._parse(arguments)
        assert make_plan(find_sweep(options.name), parse_settings(options.settings)).groups
        return
    if module == "pytest":
        paths = [word.split("::")[0] for word in arguments if word.startswith("tests/")]
        assert all((ROOT / path).exists() for path in paths)
        return
    place = ROOT / module.replace(".", "/")
    started = importlib.import_module(f"{module}.__main__" if place.is_dir() else module)
    if hasattr(started, "ex"):
        check_experiment(started.ex, arguments)
        if module == "experiments.benchmark":
            assert select(re.findall(r"cases=(\S+)", line)[0]) if "cases=" in line else True
    elif hasattr(started, "_parse") and arguments:  # without, a sentence only names it
        started._parse(arguments)


STATED = list(stated())
TO_CHECK = [*(line for line, reason in STATED if not reason), *in_prose()]
CHECKED = sorted({line for line in TO_CHECK if not TEMPLATE.search(line)})
assert len(STATED) > 40 and len(CHECKED) > 40


@pytest.mark.parametrize("line", CHECKED)
def test_a_command_is_accepted(line: str) -> None:
    check(line)


@pytest.mark.parametrize("line", [
    "make coffee", "python -m experiments.trian", "python -m experiments.sweep acuracy",
    "python -m experiments.benchmark with cases=pears", *(
        f"python -m experiments.train with {words}"
        for words in ("glyph anil", "glyphs algorithm.step_size=1", "glyphs iterations=many")
    ),
])  # fmt: skip
def test_a_wrong_command_is_refused(line: str) -> None:
    with pytest.raises((AssertionError, SystemExit, ImportError, UserError)):
        check(line)
