"""A wrong configuration stops the run in one line, before anything is started or recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sacred.arg_parser import get_config_updates
from toy_experiment import ex
from toy_process import environment, run

from experiments.tracking import UserError
from experiments.tracking.errors import nearest
from experiments.tracking.host import repository_info


def configure(*words: str) -> dict[str, Any]:
    """The configuration that the command line `with WORDS` leads to."""
    updates, named = get_config_updates(words)
    return ex._create_run(None, updates, named, options={"--unobserved": True}).config


WRONG = {
    "lrr=3": "no configuration entry 'lrr'; did you mean 'lr'?",
    "data.wayz=3": "no configuration entry 'data.wayz'; did you mean 'data.ways'?",
    "data.augment.noise.scal=1": "did you mean 'data.augment.noise.scale'?",
    "augment.flip=True": "did you mean 'data.augment.flip'?",
    "quik": "no named config 'quik'; did you mean 'quick'?",
    "dta.few": "no named config 'dta.few'; did you mean 'data.few'?",
    "misspelt": "no configuration entry 'stepz'; did you mean 'steps'?",
    "lr=abc": "lr must be float, got 'abc' (str)",
    "flag=truee": "flag must be bool, got 'truee' (str)",
    "flag=1": "flag must be bool, got 1 (int)",
    "steps=1.5": "steps must be int, got 1.5 (float)",
    "steps=True": "steps must be int, got True (bool)",
    "steps=None": "steps must be int, got None (NoneType)",
    "steps.more=1": "no configuration entry 'steps.more'",
    "data.augment.flip=3": "data.augment.flip must be bool, got 3 (int)",
    "data=3": "data must be dict, got 3 (int)",
    "data.augment=3": "data.augment must be dict, got 3 (int)",
    "widths=[1.5]": "widths[0] must be int, got 1.5 (float)",
    "limit=x": "limit must be int | None, got 'x' (str)",
    "seed=-1": "seed must be an int from 0 to 4294967295, got -1",
    "data.seed=x": "data.seed must be an int from 0 to 4294967295, got 'x'",
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_word_is_an_error_that_names_the_right_one(word: str) -> None:
    with pytest.raises(UserError) as caught:
        configure(word)
    assert WRONG[word] in str(caught.value) and "\n" not in str(caught.value)


def test_right_words_are_taken() -> None:
    config = configure("lr=1", "limit=4", "anything=[1]", "widths=(8,)", "seed=3", "data.seed=4")
    assert (config["lr"], config["limit"], config["anything"]) == (1, 4, [1])
    assert (list(config["widths"]), config["seed"], config["data"]["seed"]) == ([8], 3, 4)


def test_an_explicit_key_beats_a_named_config_in_either_order() -> None:
    assert configure("data.few")["data"]["ways"] == 2
    assert configure("data.ways=7", "data.few")["data"]["ways"] == 7
    assert configure("data.few", "data.ways=7")["data"]["ways"] == 7


def test_a_far_name_gets_no_suggestion() -> None:
    assert nearest("zzzz", ["lr", "data.ways"]) == ""


@pytest.mark.parametrize("word", ["data.wayz=3", "steps=1.5", "quik", "misspelt"])
def test_a_wrong_word_starts_and_records_nothing(tmp_path: Path, word: str) -> None:
    code, output = run(environment(tmp_path), "with", word)
    assert code == 1 and output.startswith("error: ") and output.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_an_unobserved_run_starts_and_records_nothing(tmp_path: Path) -> None:
    code, output = run(environment(tmp_path), "-u", "with", "quick")
    assert code == 0 and "end" in output
    assert not any(tmp_path.iterdir())


def test_a_wrong_usage_exits_with_2(tmp_path: Path) -> None:
    code, output = run(environment(tmp_path), "--no-such-option")
    assert code == 2 and "Usage:" in output


def test_an_error_the_user_made_is_one_line(tmp_path: Path) -> None:
    code, output = run(environment(tmp_path), "-u", "with", "fault=user")
    assert code == 1 and "Traceback" not in output
    assert output.splitlines()[-1] == "error: the toy was told to fail"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("artifact", "FileNotFoundError: no file 'no/such/file.txt' to add as an artifact"),
        ("value", "TypeError: metric 'loss' must be a number or a one-element tensor"),
        ("name", "ValueError: a metric's name is a string such as 'train/loss'"),
    ],
)
def test_a_wrong_record_is_an_error_at_the_call(
    tmp_path: Path, fault: str, message: str
) -> None:
    code, output = run(environment(tmp_path), "-u", "with", f"fault={fault}")
    assert code == 1 and message in output


def test_a_folder_without_a_commit_has_no_repository(tmp_path: Path) -> None:
    assert repository_info(tmp_path) == []
