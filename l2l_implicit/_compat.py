"""Two repairs without which learn2learn does not import, or not quietly.

`import l2l_implicit` applies them once; a module of ours that needs learn2learn imports
`l2l_implicit` first. This file imports neither torchvision nor gym nor learn2learn.
"""

import contextlib
import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

# The operators for which torchvision registers a fake kernel even if its C++ library did not load:
# none in 0.16, nms from 0.17 on, qnms from 0.28 on. Everything else it guards itself.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A library takes its declarations with it when it is collected.
_libraries: list[torch.library.Library] = []


class MissingOperators(importlib.abc.MetaPathFinder):
    """Lets torchvision import beside a torch that its C++ operators do not fit.

    torchvision's wheels are built for CUDA. Beside a CPU-only torch their library does not load,
    and the import ends in `operator torchvision::nms does not exist`. Declaring the schema,
    without a kernel, is enough: transforms, datasets and models work, and an operator that is
    called still raises.

    Declaring it where the library does load would abort the process, and only torchvision knows
    (the library's file name, for one, changed in 0.29). So this finder finds nothing itself: it
    waits for the import that follows torchvision's own attempt, and asks for the outcome.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Declare what is missing just before torchvision registers its fake kernels."""
        if fullname == "torchvision._meta_registrations":
            extension = importlib.import_module("torchvision.extension")
            if hasattr(extension, "_has_ops") and not extension._has_ops():
                declare_missing_operators()
        return None


def declare_missing_operators() -> tuple[str, ...]:
    """Declare, without kernels, those of torchvision's operators that nobody has declared.

    Returns:
        The names of the operators declared by this call.
    """
    missing = tuple(name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name))
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(_SCHEMAS[name])
    _libraries.append(library)
    return missing


def silence_gym_notice() -> None:
    """Empty gym's table of notices, one of which it prints whenever it is first imported.

    learn2learn imports gym, for reinforcement learning only, and cannot move to its successor.
    """
    with contextlib.suppress(ImportError):  # an old gym has no notices
        importlib.import_module("gym_notices.notices").notices.clear()


sys.meta_path.insert(0, MissingOperators())
silence_gym_notice()
