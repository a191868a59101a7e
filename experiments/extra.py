"""Imported first by whatever needs more than the library: says in one line what to install."""

import importlib.util
import os
import sys
import warnings

warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # Sacred imports it

for _name in (
    "sacred", "pymongo", "matplotlib", "pydantic", "yaml", "distributed", "cryptography", "pandas",
    "jinja2", "tabulate", "scipy",
):  # fmt: skip
    try:
        _found = importlib.util.find_spec(_name)
    except ModuleNotFoundError:
        _found = None
    if _found is None:
        raise ModuleNotFoundError(
            f"expected {_name} for the experiments, got none; "
            "pip install -r requirements.txt, or -r requirements-learn2learn.txt '.[experiments]'",
            name=_name,
        )

for _name in ("stdout", "stderr"):
    if getattr(sys, _name) is None:  # closed; the next file would be opened under its number
        setattr(sys, _name, open(os.devnull, "w"))
if hasattr(sys.stdout, "reconfigure"):  # no letter that an encoding lacks ends a run
    sys.stdout.reconfigure(errors="backslashreplace")
