"""Two repairs without which learn2learn does not import, or not quietly.

`import l2l_implicit` applies them once; a module of ours that needs learn2learn imports
`l2l_implicit` first. Neither imports torchvision, gym or learn2learn.
"""

import contextlib
import importlib
import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

# The operators for which `import torchvision` registers a fake kernel whether or not its C++
# library loaded: none in 0.16, nms from 0.17, qnms from 0.28 on. All others it guards itself.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A library takes its declarations with it when it is collected.
_libraries: list[torch.library.Library] = []


def declare_missing_operators() -> tuple[str, ...]:
    """Let torchvision import beside a torch that its C++ operators do not fit.

    The torchvision wheels of the registry are built for CUDA. Beside a CPU-only torch their library
    does not load, and `import torchvision` ends in `operator torchvision::nms does not exist`.
    Only then the schemas are declared, without kernels: transforms, datasets and models work,
    and an operator that is called still raises. Where the library loads nothing is declared,
    nor where torchvision is absent or already imported.

    Returns:
        The names of the operators declared by this call.
    """
    folder = None if "torchvision" in sys.modules else _package_folder("torchvision")
    if folder is None or _operators_load(folder):
        return ()
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(_SCHEMAS[name])
    _libraries.append(library)
    return tuple(missing)


def silence_gym_notice() -> None:
    """Empty gym's table of notices, one of which it prints whenever it is first imported.

    learn2learn imports gym, for reinforcement learning only, and cannot move to its successor.
    """
    with contextlib.suppress(ImportError):  # gym before 0.22 has no notices
        importlib.import_module("gym_notices.notices").notices.clear()


def _package_folder(name: str) -> Path | None:
    """The folder of a package that could be imported, without importing it."""
    spec = importlib.util.find_spec(name)
    locations = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(locations))) if locations else None


def _operators_load(folder: Path) -> bool:
    """Whether torchvision's library loads; it is the one torchvision would load itself."""
    candidates = [folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    library = next((path for path in candidates if path.is_file()), None)
    if library is None:
        return False
    try:
        torch.ops.load_library(str(library))
    except (ImportError, OSError):  # the two that torchvision takes for "no operators"
        return False
    return True


declare_missing_operators()
silence_gym_notice()
