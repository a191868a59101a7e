"""Sacred's experiment and ingredient, which refuse wrong configurations and lose no record."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from docopt import DocoptExit
from sacred import SETTINGS, Experiment, Ingredient, dependencies, stdout_capturing
from sacred.experiment import gather_command_line_options
from sacred.run import Run

from experiments.tracking import config, signals
from experiments.tracking.config import RunSettings, Settings
from experiments.tracking.database import LONGEST, Database, choose
from experiments.tracking.errors import TrackingError, UserError, one_line, wrong
from experiments.tracking.observer import JournalObserver
from experiments.tracking.values import CheckedMetrics, Tape, is_name, keep_output, redacted

REPOSITORY = Path(__file__).parents[2]
MONGO_OPTION = "--mongo_db"
LARGEST_ARTIFACT = 16 * 2**20
TIMEOUT = 5.0
# A disk that is full, or a pipe that nobody reads: no bug, whoever has written there.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE, errno.EROFS)
GPU_QUERY = ["--query-gpu=driver_version,memory.total,name", "--format=csv,noheader,nounits"]

SETTINGS.CAPTURE_MODE = "sys"  # `fd` loses last lines
stdout_capturing.StringIO = Tape  # the original grows as long as the run prints
SETTINGS.DISCOVER_SOURCES = SETTINGS.DISCOVER_DEPENDENCIES = "none"  # `TrackedExperiment` does
SETTINGS.HOST_INFO.INCLUDE_GPU_INFO = False  # calls nvidia-smi without a time limit


class TrackedIngredient(Ingredient):
    """`sacred.Ingredient` with ``settings``, the model of its configuration's entries.

    `TrackedExperiment` records sources and commit.
    """

    def __init__(self, name: str, settings: type[Settings]) -> None:
        caller = sys._getframe(1).f_globals
        super().__init__(name, base_dir=str(REPOSITORY), _caller_globals=caller,
                         save_git_info=False)  # fmt: skip
        self.settings = settings
        self.configurations.append(settings.summary)


class TrackedRun(Run):
    """Sacred's run, whose artifacts and metrics fail at the call instead of in the observer."""

    journal: JournalObserver | None  # of an observed run
    afterwards: list[Callable[[], object]]  # called once the record of all is on the disk

    def add_artifact(self, filename: Any, *arguments: Any, **options: Any) -> None:
        """As in Sacred; of a file that has more than 16 MiB its path and MD5, in the run's info."""
        if Path(filename).stat().st_size <= LARGEST_ARTIFACT:
            super().add_artifact(str(filename), *arguments, **options)
        else:
            path, digest = str(Path(filename).absolute()), dependencies.get_digest(filename)
            self.info.setdefault("large_artifacts", []).append({"path": path, "md5": digest})

    def _emit_artifact_added(self, *event: Any) -> None:
        for observer in self.observers:
            observer.artifact_event(*event)

    def _emit_resource_added(self, filename: str) -> None:
        for observer in self.observers:
            observer.resource_event(filename=filename)


class TrackedExperiment(Experiment):
    """`sacred.Experiment` with strict configuration and a record that survives failures.

    Args:
        name, ingredients, options: as in Sacred.
        settings: the model of the configuration's entries; each ingredient has its own. Without it
            the defaults stand in ``@ex.config``, and an entry is checked against its default.
        types: of such entries: ``{"cell": str | None}``.
    """

    def __init__(self, name: str, ingredients: Sequence[Ingredient] = (),
                 settings: type[RunSettings] | None = None,
                 types: Mapping[str, Any] | None = None, **options: Any) -> None:
        caller = sys._getframe(1).f_globals
        options = {"save_git_info": False, "base_dir": str(REPOSITORY), **options}
        super().__init__(name, ingredients=ingredients, **options)
        self.settings, self.types = settings, types
        check = partial(config.check_config, self)
        self.config_hook(lambda config, command_name, logger: check(config))
        if settings is not None:
            self.configurations.append(settings.summary)
        self.doc = caller.get("__doc__") or ""
        self.captured_out_filter = keep_output  # type: ignore[assignment]  # inferred as None
        self.mainfile = dependencies.get_main_file(caller, False)[1]  # not this one
        self.dependencies = dependencies.get_dependencies_from_pkg(caller, self.base_dir)
        sources = dependencies.get_sources_from_sys_modules(caller, self.base_dir, False)
        self.sources = {source for source in {*sources, self.mainfile}
                        if source and "site-packages" not in source.filename}  # fmt: skip
        self._on_command_line = False

    def run_commandline(self, argv: Any = None) -> Run | None:
        """Sacred's command line; expected errors are one line, without a traceback.

        Exit status: 0 only if the run completed and is wholly in the database; 1 after an
        error; 2 for a wrong usage; 128 + signal after an interruption.
        """
        self._on_command_line = True
        try:
            return super().run_commandline(argv)
        except DocoptExit as error:
            why = str(error).partition("Usage:")[0]  # docopt's usage is of a program "dummy"
            print(why + self.get_usage()[0], file=sys.stderr)
            sys.exit(2)
        except UserError as error:  # in the words of the command line
            _exit(error)
        except OSError as error:  # of what is printed without a run, such as the help
            if error.errno not in NO_ROOM:
                raise
            _exit(error)
        finally:
            self._on_command_line = False

    def _check_command(self, cmd_name: str | None) -> None:
        if text := super()._check_command(cmd_name):
            raise UserError(text.removeprefix("Error: "))

    def run(self, *arguments: Any, options: dict[str, Any] | None = None, **more: Any) -> Run:
        """As in Sacred; from the command line, expected errors end the process.

        UserError: a wrong configuration or database address; TrackingError: the database did not
        take everything.
        """
        try:
            with signals.handled():
                run = self._create_run(*arguments, options=options, **more)
                _run_to_its_end(run)
                return run
        except (UserError, TrackingError, KeyboardInterrupt, OSError) as error:
            bug = isinstance(error, OSError) and error.errno not in NO_ROOM
            if bug or not self._on_command_line or (options or {}).get("--debug"):
                raise
            _exit(error)

    def get_experiment_info(self) -> dict[str, Any]:
        """As in Sacred, with the commit of this repository."""
        return {**super().get_experiment_info(), "repositories": repository_info(self.base_dir)}

    def _create_run(self, command_name: str | None = None,
                    config_updates: dict[str, Any] | None = None,
                    named_configs: Sequence[str] = (), *,
                    options: dict[str, Any] | None = None, **more: Any) -> TrackedRun:
        """Sacred's run with its checks, and its observer unless it is unobserved."""
        asked = dict(options or {})
        updates = config.nested((config_updates or {}).items())
        config.check_groups(self, updates)
        config.check_named_configs(self, named_configs)
        if self.settings is None:
            self.settings = config.model_of(self, self.types or {})
        # Sacred would add its own observer, and only warn of what is an error here
        handed = {"--force": True}
        run: Any = super()._create_run(command_name, updates, named_configs, options=handed, **more)
        run.__class__ = TrackedRun  # Sacred builds its own Run and takes no other class
        self._apply(asked, run)
        for group in (run.config, *run.config.values()):
            if isinstance(group, dict):
                group.pop("__doc__", None)  # a named config's docstring, where Sacred puts it
        run.meta_info["options"].update(asked)
        run.host_info["gpus"] = None if run.unobserved else gpu_info()
        run._metrics = CheckedMetrics()
        run.journal, run.afterwards = None, []
        run.run_logger.addFilter(_is_for_people)
        if not run.unobserved:
            database = Database(choose(asked.get(MONGO_OPTION)))
            try:
                run.journal = JournalObserver(database, run.run_logger, run.beat_interval)
            except BaseException:
                database.close()
                raise
            run._metrics.sink = run.journal.record
            run.observers.append(run.journal)
        return run

    def _apply(self, asked: Mapping[str, Any], run: Any) -> None:
        """Sacred's options; UserError for a value that will not do."""
        for option in (*gather_command_line_options(), *self.additional_cli_options):
            flag = option.get_flag()
            if (value := asked.get(flag)) and flag != MONGO_OPTION:
                try:
                    option.apply(value, run)
                    _check_options(run)
                except (ValueError, LookupError, ImportError, OSError, RuntimeError) as error:
                    got = f"{value!r} ({one_line(error)})"
                    raise wrong(flag, "a value that fits", got) from error


def _check_options(run: Any) -> None:
    """ValueError, LookupError, OSError: of what Sacred would only fail at later."""
    for observer in run.observers:
        if folder := getattr(observer, "basedir", None):  # of -F
            os.makedirs(folder, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{folder} cannot be written to")
    stdout_capturing.get_stdcapturer(run.capture_mode)
    if not 0 <= run.beat_interval <= LONGEST:
        raise ValueError("no number of seconds")
    if run._id is not None and not is_name(run._id):
        raise ValueError("no name or number that a run may have")


def record(run: Run, values: Mapping[str, Any], step: int | None = None) -> None:
    """Log several metrics at one step, as `run.log_scalar` does for one."""
    for name, value in values.items():
        run.log_scalar(name, value, step)


def _is_for_people(line: logging.LogRecord) -> bool:
    """All but a result of many values, which Sacred writes as it is; the record has it."""
    return not str(line.msg).startswith("Result: {")


def _run_to_its_end(run: TrackedRun) -> None:
    """An error of the run counts more than one of its record, which is told."""
    try:
        run()
    except BaseException:
        try:
            _finish(run)
        except TrackingError as error:
            print(f"error: {error}", flush=True)
        raise
    try:
        _finish(run)
    finally:
        for action in run.afterwards:
            action()


def _finish(run: TrackedRun) -> None:
    if run.journal is not None:
        if run._heartbeat is not None:
            run._heartbeat.join()  # Sacred waits two seconds for its last record
        run.journal.finish()
    if names := ", ".join(type(observer).__name__ for observer in run._failed_observers):
        raise TrackingError(f"{names} failed: the run's record is not complete, see above")


def _exit(error: BaseException) -> NoReturn:
    """One line, and the exit status."""
    if not isinstance(error, KeyboardInterrupt):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # a disk that is full, a pipe that nobody reads
                print(f"error: {one_line(error)}", file=stream, flush=True)
                break
        sys.exit(1)
    number = signal.Signals(getattr(error, "signum", signal.SIGINT))
    print("interrupted" + f" by {number.name}" * (number != signal.SIGINT), flush=True)
    sys.stderr.flush()
    os._exit(128 + number)  # without taking torch down piece by piece, which can take seconds


# ---- the machine and the commit, asked so that no strange answer stops the run ----


def gpu_info() -> dict[str, Any] | None:
    """{"driver_version": ..., "gpus": [{"model": ..., "total_memory": MiB}]}, None without any."""
    rows = [line.split(", ", 2) for line in (_ask("nvidia-smi", *GPU_QUERY) or "").splitlines()]
    gpus = [{"model": row[2], "total_memory": int(row[1])}
            for row in rows if len(row) == 3 and row[1].isdigit()]  # fmt: skip
    return {"driver_version": rows[0][0], "gpus": gpus} if gpus else None


def repository_info(folder: Path | str) -> list[dict[str, Any]]:
    """[{"url", "commit", "dirty"}] of the repository around `folder`, [] without a commit.

    The URL carries no password or token; `dirty` counts changes of tracked files.
    """
    git = ("git", "--no-optional-locks", "-C", str(folder))  # a run only reads
    if (commit := _ask(*git, "rev-parse", "--verify", "HEAD")) is None:
        return []
    url = _ask(*git, "remote", "get-url", "origin") or _ask(*git, "rev-parse", "--show-toplevel")
    changes = _ask(*git, "status", "--porcelain", "--untracked-files=no")
    return [{"url": redacted(url or ""), "commit": commit, "dirty": changes != ""}]


def _ask(*command: str) -> str | None:
    """The command's output, None if there is no such command or it fails or hangs."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
