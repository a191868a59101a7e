"""Imported first by whatever needs more than the library: says in one line what to install."""

import importlib
import warnings

warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # Sacred imports it

for _name in ("sacred", "pymongo", "matplotlib"):
    try:
        importlib.import_module(_name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"expected {_name} for the experiments, got {str(error)!r}; "
            "pip install -r requirements.txt, or -r requirements-learn2learn.txt '.[experiments]'",
            name=error.name,
        ) from None
