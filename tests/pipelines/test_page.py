"""The Python of docs/examples.md runs as it stands."""

import re

import torch
from diffs import PAGE


def test_the_python_blocks_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert blocks
    for block in blocks:
        names = {"torch": torch}
        exec(compile(block, str(PAGE), "exec"), names)
        assert bool(names["features"][0].weight.grad.any())
