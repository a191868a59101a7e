"""Says what the experiments find on this machine, what is missing, and how to get it.

    python -m experiments.doctor [--root FOLDER]

Exit status 1 if something that is here does not work, or what the library stands on is missing.
An extra or a data set that is missing is no error.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

LIBRARY = "pip install -r requirements.txt"
EXTRA = "pip install -r requirements-learn2learn.txt '.[{}]'"
OK, MISSING, BROKEN = "", "missing", "BROKEN"
# learn2learn and torchvision import only after l2l_implicit.
PACKAGES = {  # module: distribution, extra
    "torch": ("torch", None),
    "numpy": ("numpy", None),
    "l2l_implicit": ("l2l-implicit", None),
    "torchvision": ("torchvision", None),
    "learn2learn": ("learn2learn", None),
    "higher": ("higher", "baselines"),
    "pytorch_lightning": ("pytorch-lightning", "lightning"),
    "sacred": ("sacred", "experiments"),
    "pymongo": ("pymongo", "experiments"),
    "matplotlib": ("matplotlib", "experiments"),
    "tqdm": ("tqdm", "experiments"),
    "pydantic": ("pydantic", "experiments"),
    "distributed": ("distributed", "experiments"),
    "pandas": ("pandas", "experiments"),
    "jinja2": ("Jinja2", "experiments"),
    "scipy": ("scipy", "experiments"),
}


class Finding(NamedTuple):
    """One line of the answer."""

    name: str
    text: str
    state: str = OK


def main() -> int:
    """Print all findings; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.doctor")
    parser.add_argument("--root", default="~/data", help="folder of the data sets (%(default)s)")
    root = Path(parser.parse_args().root).expanduser()
    warnings.simplefilter("ignore")  # of packages about one another: none is about this machine
    sections: dict[str, Callable[[], Iterable[Finding]]] = {
        "Packages": packages,
        "Compute": compute,
        "learn2learn and torchvision": repairs,
        "Hypergradient": hypergradient,
        "Database": database,
        f"Data sets in {root}": lambda: datasets(root),
    }
    broken = 0
    for title, section in sections.items():
        print(f"{title}:")
        for name, text, state in section():
            print(f"  {name:<18} {f'{state}: ' if state else ''}{text}")
            broken += state == BROKEN
    print(f"{broken} broken" if broken else "Nothing that is needed is broken.")
    return 1 if broken else 0


def packages() -> Iterable[Finding]:
    """The versions of what the library and its extras stand on."""
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    for module, (distribution, extra) in PACKAGES.items():
        found, problem = imported(module)
        if found is not None:
            yield Finding(distribution, version_of(found, distribution))
        elif problem:
            yield Finding(distribution, f"{problem}; {how_to_get(extra)}", BROKEN)
        else:
            yield Finding(distribution, how_to_get(extra), MISSING if extra else BROKEN)
    try:  # a program, and under the GPL: never imported
        yield Finding("SecantusDB", version("SecantusDB"))
    except PackageNotFoundError:
        yield Finding("SecantusDB", how_to_get("experiments"), MISSING)


def imported(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why it does not import; no reason where it is not installed."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name == name:
            return None, ""
        return None, _one_line(error)
    except Exception as error:
        return None, _one_line(error)


def version_of(module: ModuleType, distribution: str) -> str:
    """The installed version; for the checkout's own package, what it says itself."""
    own = getattr(module, "__version__", None)
    if distribution == "l2l-implicit":
        return f"{own} ({Path(str(module.__file__)).parent})"
    try:
        return str(own or version(distribution))
    except PackageNotFoundError:
        return "of unknown version"


def how_to_get(extra: str | None) -> str:
    """The command that installs a missing package."""
    return EXTRA.format(extra) if extra else LIBRARY


def compute() -> Iterable[Finding]:
    """The device that `device=auto` takes, and threads."""
    torch, _ = imported("torch")
    if torch is None:
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for i, name in enumerate(names):
        yield Finding(f"cuda:{i}", name)
    if not names:
        yield Finding("device", f"cpu ({platform.machine()}); no CUDA device")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS", "unset")
    threads = torch.get_num_threads()
    yield Finding("threads", f"{threads} of torch, {cores} cores, OMP_NUM_THREADS {limit}")


def repairs() -> Iterable[Finding]:
    """What `l2l_implicit._compat` had to do on this machine."""
    compat, _ = imported("l2l_implicit._compat")
    torchvision, _ = imported("torchvision")
    if compat is None or torchvision is None:
        yield Finding("repairs", "cannot tell before the packages above import")
        return
    if torchvision.extension._has_ops():
        yield Finding("operators", "torchvision's own are loaded; nothing was declared")
    else:
        text = "torchvision's do not load beside this torch, and are declared without kernels: "
        yield Finding("operators", f"{text}transforms and data sets work, torchvision.ops do not")
    notices = sys.modules.get("gym_notices.notices")
    quiet = notices is None or not notices.notices
    yield Finding("gym's notice", "silenced" if quiet else "is printed")


def hypergradient() -> Iterable[Finding]:
    """A problem with a closed form: phi minimises (theta phi - 1)^2 / 2 + phi^2 / 2, f = phi."""
    library, _ = imported("l2l_implicit")
    if library is None:
        yield Finding("check", "l2l_implicit does not import", BROKEN)
        return
    torch: Any = importlib.import_module("torch")
    theta = torch.tensor([[2.0]], requires_grad=True)
    head = library.ImplicitCGHead(torch.nn.Linear(1, 1, bias=False), lr=0.1, l2=1.0)
    learner = head.clone()
    learner.adapt(lambda: 0.5 * (learner(theta) - 1.0).square().sum(), steps=10)
    learner.module.weight.sum().backward()
    found, expected = float(theta.grad), -3.0 / 25.0  # (1 - theta^2) / (1 + theta^2)^2
    wrong = not abs(found - expected) < 1e-4
    text = f"{found:.6f}, in closed form {expected:.6f}"
    yield Finding("check", text, BROKEN if wrong else OK)


def database() -> Iterable[Finding]:
    """Which database a run would be recorded in, and whether it can be."""
    absent = [name for name in ("sacred", "pymongo") if imported(name)[0] is None]
    if absent:
        text = f"none without {' and '.join(absent)}: {how_to_get('experiments')}"
        yield Finding("records", text, MISSING)
        return
    from experiments.tracking import embedded
    from experiments.tracking.database import choose
    from experiments.tracking.errors import UserError

    try:
        choice = choose()
        yield Finding("chosen by", choice.source)
        if choice.url is None:
            yield from _embedded_files(embedded.data_folder("mongodb"))
        yield Finding("answer", _answer(choice))
    except (UserError, OSError) as error:
        state = MISSING if str(error) == embedded.NOT_INSTALLED else BROKEN
        yield Finding("answer", _one_line(error), state)


def _embedded_files(folder: Path) -> Iterable[Finding]:
    mode = folder.stat().st_mode & 0o777
    yield Finding("files", f"{folder} (mode {mode:04o}; L2L_IMPLICIT_DATA names another)")


def _answer(choice: Any) -> str:
    """The database's address and how many runs it holds, once a document could be written.

    Raises:
        UserError: it does not answer, or does not let this user write.
    """
    from pymongo.errors import PyMongoError

    from experiments.tracking.database import Database
    from experiments.tracking.errors import UserError

    opened = Database(choice)
    try:
        runs = opened.documents["runs"].estimated_document_count()
        probe = opened.documents["doctor"]
        probe.delete_one({"_id": probe.insert_one({"by": "experiments.doctor"}).inserted_id})
        probe.drop()
        return f"{opened.label}, {runs} runs, may be written to"
    except PyMongoError as error:
        raise UserError(f"{opened.label} answers; {opened.explain(error)}") from None
    finally:
        opened.close()


def datasets(root: Path) -> Iterable[Finding]:
    """Which data sets are in place; of the others, what belongs where."""
    if imported("l2l_implicit.tasks")[0] is None:
        yield Finding("all", "cannot tell before l2l_implicit imports")
        return
    from l2l_implicit.tasks.caltech101 import SOURCE
    from l2l_implicit.tasks.learn2learn_benchmarks import NEEDED
    from l2l_implicit.tasks.provide import Needed, missing, remedy

    yield Finding("glyphs, sine", "in the package")
    yield Finding("folder", "your own images: tasks.root=FOLDER")
    images = Needed("caltech101/101_ObjectCategories", "")
    there = not missing(root, [images])
    yield Finding("caltech101", "in place" if there else SOURCE, OK if there else MISSING)
    for name, needed in NEEDED.items():
        absent = [item for item in missing(root, needed) if not _archived(root, item)]
        text = f"{remedy(root, absent)}, or let the first run download it" if absent else "in place"
        yield Finding(name, text, MISSING if absent else OK)


def _archived(root: Path, item: Any) -> bool:
    """Whether the archive is there, which is unpacked at first use."""
    return item.archive is not None and (root / item.archive).is_file()


def _one_line(error: Exception) -> str:
    kind = type(error).__name__
    first = (str(error).splitlines() or [""])[0]
    return first if kind == "UserError" else f"{kind}: {first}"


if __name__ == "__main__":
    sys.exit(main())
