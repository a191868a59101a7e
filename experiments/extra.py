"""Imported first by whatever needs more than the library: says in one line what to install."""

import importlib.util
import warnings

warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # Sacred imports it


def _present(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


for _name in (
    "sacred", "pymongo", "matplotlib", "pydantic", "distributed", "pandas", "jinja2", "scipy",
):  # fmt: skip
    if not _present(_name):
        raise ModuleNotFoundError(
            f"expected {_name} for the experiments, got none; "
            "pip install -r requirements.txt, or -r requirements-learn2learn.txt '.[experiments]'",
            name=_name,
        )
