"""A wrong configuration stops the run in one line, before anything is started or recorded."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest import CaptureFixture
from toy_experiment import data, ex
from toy_process import run

from experiments.report.__main__ import main as report
from experiments.sweep import main as sweep
from experiments.tracking import TrackedExperiment, UserError
from experiments.tracking.config import words_as_updates


def configure(*words: str) -> dict[str, Any]:
    """The configuration that the command line `with WORDS` leads to."""
    updates, named = words_as_updates(words)
    return ex._create_run(None, updates, named, options={"--unobserved": True}).config


WRONG = {
    "lrr=3": "no configuration entry 'lrr'; did you mean 'lr'?",
    "data.wayz=3": "no configuration entry 'data.wayz'; did you mean 'data.ways'?",
    "flip=True": "no configuration entry 'flip'; did you mean 'data.flip'?",
    "data.lr=1": "no configuration entry 'data.lr'; did you mean 'lr'?",
    "data={'wayz':1}": "no configuration entry 'data.wayz'; did you mean 'data.ways'?",
    "quik": "no named config 'quik'; did you mean 'quick'?",
    "misspelt": "no configuration entry 'stepz'; did you mean 'steps'?",
    "lr=abc": "lr: expected a finite number, got 'abc'; try 0.1",
    "lr=1e400": "lr: expected a finite number, got inf; try 0.1",
    "lr=nan": "lr: expected a finite number, got 'nan'; try 0.1",
    "flag=truee": "flag: expected True or False, got 'truee'; try True",
    "steps=1.5": "steps: expected a whole number, got 1.5; try 3",
    "steps=None": "steps: expected a whole number, got None; try 3",
    "steps={}": "steps: expected a whole number, got {}; try 3",
    "steps.more=1": "no configuration entry 'steps.more'; did you mean 'steps'?",
    "steps=1 steps.more=1": "no configuration entry 'steps.more'",
    "data=3": "data: expected a group of settings, got 3; set one as data.ways=VALUE",
    "data.few data=3": "data: expected a group of settings, got 3; set one as data.ways=VALUE",
    "data.ways=3 data={'flip':True,'ways':1}": "data.ways is given twice; give it once",
    "data.ways=3 data={}": "data is given twice; give it once",
    "widths={1,2}": "widths: expected a list, each a whole number, got {1, 2}; try [32, 64]",
    "widths=[1.5]": "widths: expected a list, each a whole number, got [1.5]; try [32, 64]",
    "limit=x": "limit: expected a whole number from 1 to 1000000000 or None, got 'x'; leave it out",
    "kind=slwo": "kind: expected one of 'slow', 'fast', got 'slwo'; did you mean 'slow'?",
    "say=5": "say: expected text, got 5; try ''",
    "seed=-1": "seed: expected a whole number from 0 to 4294967295 or None, got -1",
    "data.seed=4": "no configuration entry 'data.seed'; did you mean 'seed'?",
    "=3": "no configuration entry ''; `print_config` lists them",
    "a..b=3": "no configuration entry 'a..b'",
    "__doc__=3": "no configuration entry '__doc__'",
    "x={[]:1}": "no configuration entry 'x'",
    "anything={'py/object':'os.system'}": "no configuration entry 'py/object'",
    "steps=" + "9" * 5000: "characters); try 3",
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_word_is_an_error_that_names_the_right_one(word: str) -> None:
    with pytest.raises(UserError) as caught:
        configure(*word.split())
    assert WRONG[word] in str(caught.value) and "\n" not in str(caught.value)


def test_right_words_are_taken() -> None:
    config = configure("lr=1", "limit=4", "anything=[1]", "widths=(8,)", "seed=3")
    assert (config["lr"], config["limit"], config["anything"]) == (1, 4, [1])
    assert (list(config["widths"]), config["seed"]) == ([8], 3)
    config = configure("steps=1", "steps=2", "data.ways=3", "data={'flip':False}", "data.ways=4")
    assert (config["steps"], config["data"]["ways"], config["data"]["flip"]) == (2, 4, False)


def test_print_config_shows_the_comments_of_a_model(capsys: CaptureFixture[str]) -> None:
    ex.run("print_config", options={"--unobserved": True})
    shown = capsys.readouterr().out
    assert re.search(r"ways = 5 .*# classes a task\x1b", shown)
    assert re.search(r"fault = '' .*# a mistake of the main function; empty: none\x1b", shown)
    assert re.search(r"steps = 3$", shown, re.M)


SACREDS = {
    "--beat-interval": ["abc", "-1", "nan", "inf", "1e300"], "--loglevel": ["NOLEVEL"],
    "--capture": ["bogus"], "--s3": ["x"], "--priority": ["x"],
    "--id": ["../x", "/x", "a/b", ".", "..", "a\nb", "a\x1b", "9" * 16],
    "--file_storage": ["/dev/null", "/dev/null/x"],
}  # fmt: skip


@pytest.mark.parametrize("option", SACREDS)
def test_a_value_that_no_option_of_sacreds_takes(option: str) -> None:
    """What its run would only fail at later, or, waiting for ever, not upload."""
    for value in SACREDS[option]:
        with pytest.raises(UserError, match=f"{option}: expected a value that fits, got '"):
            ex._create_run(options={option: value, "--unobserved": True})


SECRETS = {
    "mongodb://me:Zq8@host/db": "mongodb://***@host/db", "me:Zq8@host:1:db": "***@host:1:db",
    "mongodb+srv://h/?tlsCertificateKeyFilePassword=Zq8&a=b":
        "mongodb+srv://h/?tlsCertificateKeyFilePassword=***&a=b",
}  # fmt: skip


@pytest.mark.parametrize("word", SECRETS)
def test_a_password_among_the_words_is_not_told(word: str, capsys: CaptureFixture[str]) -> None:
    """Nor what a terminal would obey; an unknown command is one line."""
    words: list[tuple[Callable[[list[str]], Any], list[str]]] = [
        (ex.run_commandline, ["toy", f"{word}\x1b[2J"]), (report, [word]), (sweep, ["smoke", word]),
        (ex.run_commandline, ["toy", "with", word]), (report, [f"--url={word}"]),
    ]  # fmt: skip
    for command, arguments in words:
        try:
            assert command(arguments) == 1
        except SystemExit as stopped:
            assert stopped.code in (1, 2)
        said = "".join(capsys.readouterr())
        assert "error: " in said and "Zq8" not in said and "\x1b" not in said
        assert SECRETS[word] in said or "=" in word


FILES = {
    "settings.json": ('{"steps": 7, "data": {"ways": 2}}', ""),
    "call.json": ('{"say": {"py/reduce": [{"py/function": "os.getcwd"}, {}]}}', "'py/reduce'"),
    "deep.json": ('{"a":' * 900 + "1" + "}" * 900, "no configuration entry 'a'"),
    "deeper.json": ('{"a":' * 90_000 + "1" + "}" * 90_000, "expected settings by name in a file"),
    "list.json": ("[1]", "expected settings by name in a file *.json, *.yaml or *.yml, got"),
    "broken.json": ('{"steps": 7', "expected settings by name in a file"),
    "settings.pickle": ("cos\ngetcwd\n(tR.", "expected settings by name in a file"),
    "settings.yaml": ("# dotted names too\nsteps: 7\ndata.ways: 2", ""),
    "settings.yml": ("steps: 7\ndata:\n  ways: 2", ""),
    "wrong.yaml": ("lr: 1e-4", "lr: expected a finite number, got '1e-4'; try 0.1"),
    "number.yaml": ("1: 2", "no configuration entry 1"),
    "call.yaml": ("say: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "alias.yaml": ("anything: &a {x: *a}", "got 'an alias'"),
    "twice.json": ('{"steps": 1, "data": {"ways": 2, "ways": 3}}', "got 'ways twice'"),
    "twice.yaml": ("steps: 1\nsteps: 2", "got 'steps twice'"),
    "dotted.json": ('{"data.ways": 2, "data": {"ways": 3}}', "data.ways is given twice"),
    "SETTINGS.JSON": ('{"steps": 7, "data.flip": true, "data": {"ways": 2}}', ""),
    "two.yaml": ("steps: 1\n---\nsteps: 2", "expected a single document"),
    "deeper.yaml": ("{a: " * 9_000 + "1" + "}" * 9_000, "expected settings by name in a file"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_settings_is_plain_data(tmp_path: Path, name: str) -> None:
    text, expected = FILES[name]
    (tmp_path / name).write_text(text)
    if not expected:
        config = configure(str(tmp_path / name))
        assert (config["steps"], config["data"]["ways"]) == (7, 2)
        return
    with pytest.raises(UserError) as caught:
        configure(str(tmp_path / name))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_an_explicit_key_beats_a_named_config_in_either_order() -> None:
    assert configure("data.few")["data"]["ways"] == 2
    assert configure("data.ways=7", "data.few")["data"]["ways"] == 7
    assert configure("data.few", "data.ways=7")["data"]["ways"] == 7


PROCESSES = {
    "with misspelt": (1, "error: no configuration"), "-u with quick": (0, "\nend\n"),
    "--no-such-option": (2, "Usage:"),
    "-u with fault=user": (1, "\nerror: the toy was told to fail\n"),
    "-u with fault=artifact": (1, "FileNotFoundError: [Errno 2] No such file or directory: 'no/"),
    "-u with fault=value": (1, "TypeError: metric 'loss' must be a number or a one-element tensor"),
}  # fmt: skip
"""Exit status, and what is printed; a refused configuration alone, and after nothing else."""


@pytest.mark.parametrize("words", PROCESSES)
def test_what_is_wrong_or_unobserved_records_nothing(tmp_path: Path, words: str) -> None:
    code, output = run(tmp_path, *words.split())
    status, text = PROCESSES[words]
    assert code == status and text in output and "dummy" not in output
    if text.startswith("error: "):
        assert output.startswith(text) and output.count("\n") == 1
    assert "Traceback" not in output or "Error: " in text
    assert not any(tmp_path.iterdir())


PLAIN = {
    "rate=1": None, "sizes=(1,2,3)": None, "cell=c12": None, "seed=4": None,
    "ratee=1": "no configuration entry 'ratee'; did you mean 'rate'?",
    "rate=abc": "rate: expected a finite number, got 'abc'; try 0.5",
    "cell=5": "cell: expected text or None, got 5; leave it out",
    "sizes=3": "sizes: expected a list, each anything, got 3",
    "on=1": "on: expected True or False, got 1", "half=x": "half: expected a finite number, got",
    "same=x": "same: expected a finite number, got",
    "data.wayz=1": "did you mean 'data.ways'?",
    "inner.step=0.2": None, "inner.deep.n=2": None, "inner.name=x": None,
    "inner.step=x": "inner.step: expected a finite number, got 'x'; try 0.1",
    "inner.stepp=1": "no configuration entry 'inner.stepp'; did you mean 'inner.step'?",
    "inner.deep.n=x": "inner.deep.n: expected a whole number, got 'x'; try 1",
    "inner.deep.m=1": "no configuration entry 'inner.deep.m'",
    "inner.name=3": "inner.name: expected text or None, got 3; leave it out",
    "seed=-1": "seed: expected",
}  # fmt: skip
"""Words for an experiment with Sacred's own defaults, and the error of each that is wrong."""


@pytest.mark.parametrize("words", PLAIN)
def test_defaults_in_sacreds_own_config_are_checked(words: str) -> None:
    ex = TrackedExperiment("plain", [data], types={"cell": str | None, "inner.name": str | None})

    @ex.config
    def defaults() -> None:
        cell, rate, sizes, on = None, 0.5, [1, 2], False  # noqa: F841
        inner = {"step": 0.1, "deep": {"n": 1}, "name": None}  # noqa: F841

    @ex.config
    def more(rate: float, data: dict[str, Any]) -> None:
        same, half = rate, data["ways"] / 2  # noqa: F841

    @ex.main
    def main(rate: float) -> float:
        return rate

    updates, _ = words_as_updates([words])
    if (message := PLAIN[words]) is None:
        ex.run(config_updates=updates, options={"--unobserved": True})
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            ex.run(config_updates=updates, options={"--unobserved": True})
