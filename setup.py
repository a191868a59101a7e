"""Installs the library; requirements.txt has the pinned set that the experiments run with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """The version, from the one place that states it (importing the package would need torch)."""
    source = (ROOT / "l2l_implicit" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('expected a line `__version__ = "X.Y.Z"` in l2l_implicit/__init__.py')
    return match.group(1)


EXTRAS = {
    # SecantusDB is GPL-2.0-only and never imported by the library: see requirements.txt.
    "experiments": [
        "sacred>=0.8.7",
        "setuptools<81",  # sacred imports pkg_resources
        "pymongo>=4.6",
        "SecantusDB>=0.7.0b3",
        "matplotlib>=3.7",
        "tqdm>=4.60",
        "pydantic>=2.9",  # 2.8 takes no strict= for a list of numbers with bounds
        "pyyaml>=6.0",
        "distributed>=2024.2",  # sweeps
        "bokeh>=3.3",  # its dashboard
        "cryptography>=41",  # TLS between its processes
        "pandas>=2.1,<3",  # the first 3 needs numpy 2
        "jinja2>=3.1.3",
        "tabulate>=0.9",  # pandas' Markdown
        "scipy>=1.11.2",
        "higher>=0.2.1",
    ],
    "baselines": ["higher>=0.2.1"],
    "lightning": ["pytorch-lightning>=2.6,<3"],  # the first whose fit() takes weights_only
    # docs/transformers.md. Tried with the lower bounds, which are the newest of this writing.
    "huggingface": ["transformers>=5.24,<6", "peft>=0.21,<1"],
    "dev": [
        "pytest>=8",
        "pytest-xdist",
        "hypothesis",
        "coverage",
        "ruff",
        "mypy",
        "tox>=4",
        "build",
        "twine",
    ],
}

setup(
    name="l2l-implicit",
    version=read_version(),
    description="Implicit meta-learning for learn2learn and higher: constant memory in inner steps",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the l2l_implicit authors",
    license="MIT",
    packages=find_packages(include=["l2l_implicit", "l2l_implicit.*"]),
    package_data={"l2l_implicit": ["py.typed", "tasks/*.npz", "tasks/*.md"]},
    python_requires=">=3.11",
    install_requires=[
        # The first whose autograd takes a GradientEdge as an input; on Python 3.12 the first whose
        # torchrun does not crash and that compiles.
        "torch>=2.2; python_version != '3.12'",
        "torch>=2.4; python_version == '3.12'",
        "learn2learn>=0.2.0",
        "numpy>=1.23.5,<2",  # learn2learn needs qpth, which refuses numpy 2
    ],
    extras_require=EXTRAS,
    zip_safe=False,
    classifiers=[
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
