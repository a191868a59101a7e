"""Where things lay on the machine of a run: replaced in what is given to others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REMOTE = re.compile(r"(https?|ssh|git)://|[\w.-]+@[\w.-]+:")
INSTALLED = re.compile(r"/[^\s\"':]*/(?=site-packages/|lib/python3)")


class Places:
    """The folders that a run's document names.

    Args:
        run: its document.
    """

    def __init__(self, run: Mapping[str, Any]) -> None:
        config = run.get("config") or {}
        tasks = config.get("tasks")
        folders = {
            (run.get("experiment") or {}).get("base_dir"): ".",
            (tasks.get("root") if isinstance(tasks, Mapping) else None): "DATA",
            config.get("output"): "runs",
            str(Path.home()): "~",
        }
        known = {folder: word for folder, word in folders.items()
                 if isinstance(folder, str) and folder.startswith("/") and len(folder) > 1}
        longest = sorted(known, key=len, reverse=True)
        self._words = [(re.compile(re.escape(f.rstrip("/")) + r"(?![\w.-])"), known[f])
                       for f in longest]  # fmt: skip

    def hidden(self, value: Any) -> Any:
        """A copy of a document in which words stand for the folders."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, Mapping):
            copy = {key: self.hidden(item) for key, item in value.items()}
            if isinstance(copy.get("url"), str) and not REMOTE.match(copy["url"]):
                copy["url"] = ""  # of a repository that was cloned from a folder
            return copy
        if isinstance(value, (list, tuple)):
            return [self.hidden(item) for item in value]
        return value

    def _text(self, text: str) -> str:
        if "/" not in text:
            return text
        for pattern, word in self._words:
            text = pattern.sub(word, text)
        return INSTALLED.sub("", text)
