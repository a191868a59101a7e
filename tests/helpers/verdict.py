"""What a call gave, what the library itself said meanwhile, and whether that was enough.

The rule: the number is right, or the library warns, or it raises one line that says what it
expected. A wrong number without a word fails.
"""

import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

import l2l_implicit

OURS = str(Path(l2l_implicit.__file__).parent)
LATER = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
CLEAR = (ValueError, TypeError, RuntimeError, ArithmeticError, AttributeError)
LIMIT = 0.02


class Heard:
    """A call's value, its error, and the warnings that the library gave meanwhile."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.value: Any = None
        self.error: Exception | None = None
        self.warned: list[str] = []
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self._note
            try:
                self.value = call()
            except Exception as error:
                self.error = error

    def _note(self, message: Warning | str, category: type[Warning], *_: Any) -> None:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename == warnings.__file__:
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(OURS) and not issubclass(category, LATER):
            self.warned.append(str(message))

    @property
    def refused(self) -> bool:
        return self.error is not None and clear(self.error)


def clear(error: Exception) -> bool:
    """Whether an error is one line, raised in the library, that says what was expected."""
    if not isinstance(error, CLEAR) or isinstance(error, RecursionError | NotImplementedError):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised = last.filename.startswith(OURS) and (last.line or "").strip().startswith("raise")
    text = str(error).strip()
    return raised and "\n" not in text and "expected" in text.lower() and len(text) < 600


def off(got: Tensor, right: Tensor) -> float:
    """The relative error; nan is infinitely wrong."""
    gap = float((got.detach().double() - right).norm() / right.norm())
    return gap if gap == gap else float("inf")


def judge(
    call: Callable[[], Tensor], right: Tensor | Callable[[], Tensor], limit: float = LIMIT
) -> str:
    """Right, warned of or refused; anything else fails. A truth that costs much is asked last."""
    heard = Heard(call)
    if heard.error is not None:
        if not heard.refused:
            raise heard.error
        return "refused"
    if callable(right) and heard.warned:
        return "warned"
    error = off(heard.value, right() if callable(right) else right)
    if error <= limit:
        return "right"
    assert heard.warned, f"a relative error of {error:.2g} and no warning"
    return "warned"


def must_be_right(call: Callable[[], Tensor], right: Tensor, limit: float = LIMIT) -> None:
    """The control, a problem without the difficulty: right, and nothing said."""
    heard = Heard(call)
    if heard.error is not None:
        raise heard.error
    assert not heard.warned, heard.warned
    assert off(heard.value, right) <= limit
