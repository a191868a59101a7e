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
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARY = "pip install -r requirements.txt"
EXTRA = "pip install -r requirements-learn2learn.txt '.[{}]'"
OK, MISSING, BROKEN = "", "missing: ", "BROKEN: "
PACKAGES = {  # extra: modules; learn2learn and torchvision import only after l2l_implicit
    "": "torch numpy l2l_implicit torchvision learn2learn",
    "baselines": "higher",
    "lightning": "pytorch_lightning",
    "experiments": "sacred pymongo matplotlib tqdm pydantic yaml distributed bokeh cryptography"
    " pandas jinja2 tabulate scipy",
}
Findings = Iterator[tuple[str, str, str]]
"""Name, state and text of each line of the answer."""


def main() -> int:
    """Print all findings; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.doctor")
    parser.add_argument("--root", default="~/data", help="folder of the data sets (%(default)s)")
    root = Path(os.path.expanduser(parser.parse_args().root))
    warnings.simplefilter("ignore")  # of packages about one another: none is about this machine
    sections: dict[str, Callable[[], Findings]] = {
        "Packages": packages,
        "Compute": compute,
        "Hypergradient": hypergradient,
        "Database": database,
        f"Data sets in {root}": lambda: datasets(root),
    }
    broken = 0
    for title, section in sections.items():
        print(f"{printable(title)}:")
        for name, state, text in whole(section):
            print(f"  {name:<18} {state}{printable(text)}")
            broken += state == BROKEN
    print(f"{broken} broken" if broken else "Nothing that is needed is broken.")
    return 1 if broken else 0


def whole(section: Callable[[], Findings]) -> Findings:
    """All that it finds; what it trips over is one more finding."""
    try:
        yield from section()
    except Exception as error:
        yield "error", BROKEN, _one_line(error)


def printable(text: str) -> str:
    """What a terminal would obey is shown as text; nothing is imported for it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def imported(name: str) -> tuple[Any, str]:
    """The module, or None and why it does not import; no reason where it is not installed."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        return None, "" if absent else _one_line(error)


def packages() -> Findings:
    """The versions of what the library and its extras stand on."""
    yield "python", OK, f"{platform.python_version()} ({sys.executable})"
    for extra, modules in PACKAGES.items():
        for module in modules.split():
            (found, problem), name = imported(module), module.replace("_", "-")
            if found is None:
                text = "; ".join(filter(None, (problem, EXTRA.format(extra) if extra else LIBRARY)))
                yield name, MISSING if extra and not problem else BROKEN, text
            elif module == "l2l_implicit":  # perhaps a checkout that is not installed
                yield name, OK, f"{found.__version__} ({Path(found.__file__).parent})"
            else:
                yield name, OK, getattr(found, "__version__", "") or version(name)
    try:  # a program, and under the GPL: never imported
        yield "SecantusDB", OK, version("SecantusDB")
    except PackageNotFoundError:
        yield "SecantusDB", MISSING, EXTRA.format("experiments")


def compute() -> Findings:
    """The device that `device=auto` takes, and threads."""
    if (torch := imported("torch")[0]) is None:
        return
    for i in range(torch.cuda.device_count()):
        yield f"cuda:{i}", OK, torch.cuda.get_device_name(i)
    if not torch.cuda.device_count():
        yield "device", OK, f"cpu ({platform.machine()}); no CUDA device"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    own, limit = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS", "unset")
    yield "threads", OK, f"{own} of torch, {cores} cores, OMP_NUM_THREADS {limit}"


def hypergradient() -> Findings:
    """A problem with a closed form: phi minimises (theta phi - 1)^2 / 2 + phi^2 / 2, f = phi."""
    if (library := imported("l2l_implicit")[0]) is None:
        yield "check", BROKEN, "l2l_implicit does not import"
        return
    torch: Any = importlib.import_module("torch")
    theta = torch.tensor([[2.0]], requires_grad=True)
    learner = library.ImplicitCGHead(torch.nn.Linear(1, 1, bias=False), lr=0.1, l2=1.0).clone()
    learner.adapt(lambda: 0.5 * (learner(theta) - 1.0).square().sum(), steps=10)
    learner.module.weight.sum().backward()
    found, expected = float(theta.grad), -3.0 / 25.0  # (1 - theta^2) / (1 + theta^2)^2
    text = f"{found:.6f}, in closed form {expected:.6f}"
    yield "check", OK if abs(found - expected) < 1e-4 else BROKEN, text


def database() -> Findings:
    """Which database a run would be recorded in, and whether it can be."""
    if absent := [name for name in ("sacred", "pymongo") if imported(name)[0] is None]:
        how = EXTRA.format("experiments")
        yield "records", MISSING, f"none without {' and '.join(absent)}: {how}"
        return
    from pymongo.errors import PyMongoError

    from experiments.tracking import UserError, embedded
    from experiments.tracking.database import Database, choose

    try:
        choice = choose()
        yield "chosen by", OK, choice.source
        if choice.url is None:
            folder = embedded.data_folder("mongodb")
            mode = f"mode {folder.stat().st_mode & 0o777:04o}"
            yield "files", OK, f"{folder} ({mode}; L2L_IMPLICIT_DATA names another)"
        with closing(Database(choice)) as opened:
            try:
                runs = opened.documents["runs"].estimated_document_count()
                probe = opened.documents["doctor"]
                probe.delete_one({"_id": probe.insert_one({"by": "the doctor"}).inserted_id})
                probe.drop()
            except PyMongoError as error:
                raise UserError(f"{opened.label} answers; {opened.explain(error)}") from None
            yield "answer", OK, f"{opened.label}, {runs} runs, may be written to"
    except (UserError, OSError) as error:
        state = MISSING if str(error) == embedded.NOT_INSTALLED else BROKEN
        yield "answer", state, _one_line(error)


def datasets(root: Path) -> Findings:
    """Which data sets are in place; of the others, what belongs where."""
    if imported("l2l_implicit.tasks")[0] is None:
        yield "all", OK, "cannot tell before l2l_implicit imports"
        return
    from l2l_implicit.tasks.caltech101 import SOURCE
    from l2l_implicit.tasks.learn2learn_benchmarks import NEEDED
    from l2l_implicit.tasks.provide import Needed, missing, remedy

    yield "glyphs, sine", OK, "in the package"
    yield "folder", OK, "your own images: tasks.root=FOLDER"
    there = not missing(root, [Needed("caltech101/101_ObjectCategories", "")])
    yield "caltech101", OK if there else MISSING, "in place" if there else SOURCE
    for name, needed in NEEDED.items():
        # an archive is unpacked at first use
        absent = [item for item in missing(root, needed)
                  if item.archive is None or not (root / item.archive).is_file()]  # fmt: skip
        text = f"{remedy(root, absent)}, or let the first run download it" if absent else "in place"
        yield name, MISSING if absent else OK, text


def _one_line(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    kind = type(error).__name__
    return first if kind == "UserError" else f"{kind}: {first}"


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except OSError as error:  # a disk that is full behind the output
        sys.exit(f"error: {error}")
    sys.exit(status)
