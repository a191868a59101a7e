"""The outer loop of one run: iterations, validations, tests, and when it ends."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from tqdm import tqdm

from experiments.tracking import record, signals, wrong
from experiments.tracking.config import MOST, Count, OfTuple, Positive, RunSettings
from experiments.training import checkpoint
from experiments.training.episodes import Tasks, TaskStream
from experiments.training.meta_learner import Diverged, Interval, MetaLearner, snapshot
from experiments.training.peak_memory import peak_memory, process_peak
from experiments.training.scores import History, Scores

_SKIPPING = ("train", "validation", "test", "early_stopped")
_PARTS = ("scores", "history", "learner")
_STATE: dict[str, Any] = {"steps": int, "seconds": float, "_validated_at": float, "_looked": bool,
                          "diverged": (str, NoneType), "peak": int}  # fmt: skip


class Schedule(RunSettings):
    """What a run does when."""

    # outer iterations, at most; 0: a test, of trained parameters= for example
    iterations: Annotated[int, Field(ge=0, le=MOST)] = 600
    meta_batch: Count = 8  # tasks an outer iteration, |B|
    # constant, or cosine: from meta_lr down to 0 at the end, of the budget where there is one
    meta_lr_schedule: Literal["constant", "cosine"] = "constant"
    validate_every: Count = 100  # outer iterations between validations
    validate_seconds: Positive | None = None  # seconds of training between validations, instead
    validation_tasks: Count = 100  # of every validation
    test_tasks: Count = 600  # of every test
    # outer iterations at which the test score is recorded besides
    test_at: Annotated[list[Count], OfTuple] = []
    early_stopping: bool = False  # test theta of the best validation besides, and keep it
    # seconds of training whose test score is the result, the run goes on to the last of test_at;
    # None: no limit, the result is that of the last iteration
    budget: Positive | None = None
    # cpu (of this process, whatever else the machine does) or wall
    budget_clock: Literal["cpu", "wall"] = "cpu"
    checkpoint_seconds: Positive = 60.0  # between checkpoints
    # write metrics.csv into the run's folder at every checkpoint: a row an outer iteration
    metrics_csv: bool = False

    @model_validator(mode="after")
    def _reaches_its_tests(self) -> Schedule:
        if (last := max(self.test_at, default=0)) > self.iterations:
            raise wrong("test_at", f"outer iterations up to iterations={self.iterations}", last,
                        "raise iterations")
        return self

    def bar(self, silent: bool) -> tqdm:  # type: ignore[type-arg]
        """In outer iterations, or in seconds of training where a budget ends the run."""
        form = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of training [{elapsed}<{remaining}{postfix}]"
        silent = silent or not self.iterations
        return tqdm(desc="meta-training", disable=silent, total=self.budget or self.iterations,
                    unit="iteration", bar_format=form if self.budget else None)


class Training:
    """One run: the outer loop with what it records.

    Args:
        seed: of the stream of training tasks; validation and test tasks are always the same.
        folder: where checkpoints go.
    """

    def __init__(
        self, run: Any, learner: MetaLearner, tasks: Tasks, schedule: Schedule, seed: int,
        folder: Path,
    ) -> None:  # fmt: skip
        self.run, self.learner, self.tasks, self.schedule = run, learner, tasks, schedule
        self.folder, self._stream, self.history = folder, self._drawn("train", seed), History()
        self.scores = Scores(learner, schedule.early_stopping)
        self.steps, self.seconds = 0, 0.0  # so far; by the schedule's clock
        self.peak = 0  # bytes of live tensors, at most, in the measured steps
        self.diverged: str | None = None  # the reason, if the run left the finite numbers
        self._looked, self._validated_at, self._saved_at = True, 0.0, time.monotonic()

    def _drawn(self, mode: str, seed: int) -> TaskStream:
        return self.tasks.stream(mode, seed, self.learner.skip, self._say)

    def skipped_tasks(self) -> int:
        """In training, validations and tests."""
        return int(sum(sum(self.history.values(f"{part}/skipped_tasks")) for part in _SKIPPING))

    def _say(self, text: str) -> None:
        if self.learner.ranks.first:
            tqdm.write(text)

    def loop(self) -> None:
        """All outer iterations, with a progress bar, and the test at the end.

        KeyboardInterrupt: by a signal; the state is saved unless there were two.
        """
        try:
            with signals.deferred():
                self._loop()
        except KeyboardInterrupt:
            if not signals.urgent():
                words = ["-u"] * self.run.unobserved + [f"resume={self.folder}"]
                self._say(f"\nsaved; python -m experiments.train {shlex.join(words)}")
            raise

    def _loop(self) -> None:
        with self.schedule.bar(silent=not self.learner.ranks.first) as bar:
            bar.update(self._progress())
            while self.diverged is None and not (self._finished() and self._looked):
                try:
                    if self._looked:
                        self._iterate()
                        self._looked = False
                        self._end_if_asked()
                    self._look(bar)
                    self._looked = True
                except Diverged as reason:
                    where = (f"at outer iteration {self.steps + 1}" if self._looked
                             else f"in the validation after outer iteration {self.steps}")
                    self._note_divergence(f"{where}: {reason}")
                bar.update(self._progress() - bar.n)
                if time.monotonic() - self._saved_at >= self.schedule.checkpoint_seconds:
                    self._save()
        if self.scores.result is None:
            self._save()  # a test that is broken off begins anew
            self.scores.result = self._test()
        self._save()
        self._test_best()
        self._save()
        self._end_if_asked()

    def _end_if_asked(self) -> None:
        """On every rank after the same step, or one would wait for the others."""
        if any(self.learner.ranks.gather(signals.asked())):
            self._save()
            signals.check()
            raise KeyboardInterrupt

    def _progress(self) -> float:
        """Of the bar's total, which it must not pass."""
        budget = self.schedule.budget
        return self.steps if budget is None else min(self.seconds, budget)

    def _spent(self) -> bool:
        return self.schedule.budget is not None and self.seconds >= self.schedule.budget

    def _finished(self) -> bool:
        last = max(self.schedule.test_at, default=0) if self._spent() else self.schedule.iterations
        return self.steps >= last

    def _iterate(self) -> None:
        start, schedule, iteration = time.perf_counter(), self.schedule, self.steps + 1
        skipped, batch = self._stream.skipped, schedule.meta_batch
        episodes = [self._stream.sample(f"outer iteration {iteration}, task {task} of {batch}")
                    for task in range(1, batch + 1)]  # fmt: skip
        loading = time.perf_counter() - start
        if iteration % schedule.validate_every == 1 or schedule.validate_every == 1:
            self._measure_memory(iteration, episodes)
        if schedule.meta_lr_schedule == "cosine":
            self.learner.anneal(self._progress() / (schedule.budget or schedule.iterations))
        step = self.learner.step(episodes)
        self.steps = iteration
        self.seconds += step["cpu_seconds" if schedule.budget_clock == "cpu" else "seconds"]
        if "skipped_tasks" in step:
            step["skipped_tasks"] += self._stream.skipped - skipped
        step |= {"loading_seconds": loading, "process_peak_bytes": process_peak()}
        self._record({f"train/{name}": value for name, value in step.items()}, iteration)

    def _measure_memory(self, iteration: int, episodes: list[Any]) -> None:
        """On a repetition of the step's gradient that is not timed: counting slows it down."""
        learner = self.learner
        put_back = snapshot(learner.algorithms.training.network)
        with learner.ranks.together(Diverged):
            peak = peak_memory(lambda: learner.hypergradient(episodes), learner.device)
        put_back()
        self.peak = max(self.peak, peak)
        self._record({"train/step_peak_bytes": peak}, iteration)

    def _look(self, bar: Any) -> None:
        """Validate and test where it is due after an outer iteration."""
        schedule, done = self.schedule, self.steps
        due = done % schedule.validate_every == 0
        if schedule.validate_seconds is not None:
            due = self.seconds - self._validated_at >= schedule.validate_seconds
        ends = self._spent() and self.scores.result is None
        due = (due or ends or self._finished()) and done not in dict(self.scores.validations)
        if due or ends or done in schedule.test_at:
            self._save()  # what is broken off begins anew
        if due:
            bar.set_postfix_str(f"validation {self.learner.measure.show(self._validate())}")
        if ends:
            self.scores.result = self._test()
        if done in schedule.test_at:
            self._test()

    def _validate(self) -> Interval:
        score, more = self._evaluate("validation")
        self.scores.validations.append((self.steps, score))
        if self.scores.best is not None and self.scores.result is None:
            self.scores.best.offer(self.steps, self.seconds, score.mean)
        self._record_score("validation", score, self.steps, self.seconds, more)
        self._validated_at = self.seconds
        return score

    def _test(self) -> Interval:
        """Of theta as it is; once an iteration."""
        tests, at = self.scores.tests, self.steps
        if at not in tests:
            tests[at], more = self._finite(f"after outer iteration {at}", self._note_divergence)
            self._record_score("test", tests[at], at, self.seconds, more)
        return tests[at]

    def _test_best(self) -> None:
        """Theta of the best validation, if there is one and it is asked for."""
        best, score = self.scores.best, self.scores.stopped
        if best is None or not best.iteration or score is not None:
            return
        score, more = self.scores.tests.get(best.iteration), dict[str, float]()
        if score is None:
            with best.in_place():
                score, more = self._finite(f"of outer iteration {best.iteration}",
                                           lambda why: self._say(f"not early stopped, {why}"))
        self._record_score("early_stopped", score, best.iteration, best.seconds, more)
        self.scores.stopped = score

    def _finite(
        self, which: str, failed: Callable[[str], None]
    ) -> tuple[Interval, dict[str, float]]:
        """A test; not a number, and ``failed`` told, if it diverges."""
        try:
            return self._evaluate("test")
        except Diverged as reason:
            failed(f"in the test {which}: {reason}")
            return Interval(math.nan, math.nan), {}

    def _record_score(
        self, part: str, score: Interval, at: int, seconds: float, more: Mapping[str, float]
    ) -> None:
        values = {self.learner.measure.name: score.mean, "half_width": score.half_width,
                  "training_seconds": seconds, **more}  # fmt: skip
        self._record({f"{part}/{name}": value for name, value in values.items()}, at)

    def _evaluate(self, mode: str) -> tuple[Interval, dict[str, float]]:
        """The score on tasks of ``mode``, the seconds it took, the tasks skipped if any may be."""
        stream, learner, start = self._drawn(mode, 0), self.learner, time.perf_counter()
        silent = mode != "test" or not learner.ranks.first

        def breakable(numbers: Iterable[int]) -> Iterator[int]:
            for number in tqdm(numbers, "meta-testing", unit="task", leave=False, disable=silent):
                signals.check()  # between two tasks
                yield number

        number = {"validation": self.schedule.validation_tasks, "test": self.schedule.test_tasks}
        score = learner.evaluate(stream, number[mode], breakable)
        more: dict[str, float] = {"seconds": time.perf_counter() - start}
        if learner.skip:
            more["skipped_tasks"] = stream.skipped + learner.skipped
        return score, more

    def _note_divergence(self, reason: str) -> None:
        """A run that diverges has a result too: that of the last finite theta."""
        if self.diverged is None:
            self.diverged = reason
            self._say(f"diverged {reason}")

    def _record(self, values: dict[str, Any], iteration: int) -> None:
        self.history.add(values, iteration)
        record(self.run, values, iteration)

    def _save(self) -> None:
        if self.learner.ranks.first:
            checkpoint.save(self.folder, self.state_dict())
            if self.schedule.metrics_csv:
                text = self.history.table().to_csv(index_label="iteration").encode()
                checkpoint.replace(self.folder / checkpoint.METRICS, lambda file: file.write(text))
        self._saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, and all that was recorded."""
        journal = getattr(self.run, "journal", None)
        return {
            **{name: getattr(self, name) for name in _STATE},
            **{name: getattr(self, name).state_dict() for name in _PARTS},
            "stream": self._stream.state,
            "token": None if journal is None else journal.token,
            "settings": checkpoint.settings_text(getattr(self.run, "config", {})),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; what was recorded before it is recorded again, for this run.

        UserError: another version's.
        """
        missing = self.state_dict().keys() - state.keys()
        missing |= {name for name, kind in _STATE.items() if not isinstance(state.get(name), kind)}
        if missing:
            raise wrong("resume", checkpoint.THIS_VERSION, f"one without {sorted(missing)}",
                        "resume with the version that wrote it, or start anew")
        vars(self).update({name: state[name] for name in _STATE})
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        self._stream.state = state["stream"]
        for name, iteration, value in self.history.points():
            self.run.log_scalar(name, value, iteration)
