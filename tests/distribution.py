"""Builds the sdist and the wheel, and tries the wheel as a user would; it takes minutes.

In the order of a release: build, `twine check --strict`, what is in the two files, the wheel in an
empty environment outside the checkout, its types as a type checker sees them, and the sdist's tests
of the library there: they import the wheel. Arguments are pytest's. Needs build, twine and mypy, as
`tox -e dist` has them.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTING = ("pytest>=8", "hypothesis")
# Of the checkout, all that a packager needs to build, test and document from the sdist.
IN_SDIST = ("l2l_implicit", "experiments", "tests", "docs")
TYPED = """
from l2l_implicit import CG, ImplicitCGHead
reveal_type(CG().solve)
ImplicitCGHead(lr=0.1)
"""


def run(*command: object, folder: Path = ROOT, may_fail: bool = False) -> str:
    """Run a command to its end, shown first; its output. A failure ends the program, or may not."""
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MYPY"))}
    done = subprocess.run(words, cwd=folder, env=kept, text=True, stdout=subprocess.PIPE)
    print(done.stdout, end="", flush=True)
    if done.returncode and not may_fail:
        sys.exit(f"expected exit status 0, got {done.returncode}")
    return done.stdout


def expect(what: str, missing: set[str], unwanted: set[str]) -> None:
    """Ends the program where a file is missing in, or does not belong into, a distribution."""
    if missing or unwanted:
        sys.exit(f"{what}: missing {sorted(missing)}, unwanted {sorted(unwanted)}")
    print(f"{what}: as expected", flush=True)


def sources(folder: str) -> set[str]:
    """The files under a folder of the checkout, without what running them leaves there."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    return {p.relative_to(ROOT).as_posix() for p in found if "__pycache__" not in p.parts}


def check_wheel(wheel: Path) -> None:
    """The library, all of it, and nothing else."""
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    wanted = sources("l2l_implicit")
    expect(wheel.name, wanted - inside, inside - wanted)
    print(f"{wheel.name}: {len(inside)} files, {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)


def check_sdist(sdist: Path) -> None:
    """The checkout's sources, and nothing that a run or a build has left there."""
    with tarfile.open(sdist) as archive:
        members = [member.name for member in archive.getmembers() if member.isfile()]
    inside = {name.partition("/")[2] for name in members}
    wanted = set().union(*(sources(folder) for folder in IN_SDIST))
    files = {"setup.py", "pyproject.toml", "tox.ini", "MANIFEST.in", "LICENSE", "CHANGELOG.md"}
    files |= {path.name for path in ROOT.glob("requirements*.txt")}
    strangers = {name for name in inside - wanted if name.partition("/")[0] in IN_SDIST}
    strangers |= {name for name in inside if name.startswith(("runs/", "build/", "dist/", "."))}
    expect(sdist.name, (wanted | files) - inside, strangers)
    print(f"{sdist.name}: {len(inside)} files, {sdist.stat().st_size / 2**20:.1f} MiB", flush=True)


def install(wheel: Path, environment: Path) -> Path:
    """The wheel in an empty environment, with the pinned torch and no extra; its Python."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    torch = [line for line in pins if line.startswith(("torch==", "torchvision=="))]
    run(python, "-m", "pip", "install", "--quiet", "--upgrade", "pip")
    learn2learn = ROOT / "requirements-learn2learn.txt"
    run(python, "-m", "pip", "install", "--quiet", "-r", learn2learn, *torch, *TESTING, wheel)
    run(python, "-m", "pip", "check")
    return python


def check_types(python: Path, folder: Path) -> None:
    """A type checker finds the installed package typed, and a call with an argument missing."""
    script = folder / "typed.py"
    script.write_text(TYPED)
    mypy = sys.executable, "-m", "mypy", "--python-executable", python, script.name
    said = run(*mypy, folder=folder, may_fail=True)
    for expected in ("LinearSolution", 'Missing positional argument "model"'):
        if expected not in said:
            sys.exit(f"expected {expected} in what mypy says of the installed package")


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder / "dist")
        (wheel,), (sdist,) = folder.glob("dist/*.whl"), folder.glob("dist/*.tar.gz")
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
        check_wheel(wheel)
        check_sdist(sdist)
        python = install(wheel, folder / "environment")
        where = run(python, "-c", "import l2l_implicit as l; print(l.__file__)", folder=folder)
        if not where.startswith(str(folder / "environment")):
            sys.exit(f"expected the installed package, got {where}")
        check_types(python, folder)
        shutil.unpack_archive(sdist, folder)
        (unpacked,) = folder.glob("l2l_implicit-*/")
        run(python, "tests/without_extras.py", *arguments, folder=unpacked)


if __name__ == "__main__":
    main(sys.argv[1:])
