"""Tasks that cannot be learnt: named, and stopped at or skipped, as was asked for."""

import math
from itertools import cycle
from typing import Any

import pytest
import torch
from sacred.run import Run
from torch import Tensor, nn

from experiments.tracking import UserError
from experiments.training.algorithms import Algorithms, HeadOnly
from experiments.training.episodes import MOST_IN_A_ROW, Episode, TaskStream, fault
from experiments.training.meta_learner import MEASURES, Diverged, MetaLearner
from experiments.training.scores import History
from l2l_implicit import GradientDescent, ImplicitCGHead

LABELS = torch.arange(3).repeat(2)


def episode(scale: float = 1.0) -> Episode:
    return Episode(scale * torch.randn(12, 5), LABELS, LABELS)


def with_entry(value: float) -> Episode:
    task = episode()
    task.inputs[7, 2] = value
    return task


FAULTS = {
    "inputs: expected finite numbers, got nan (sample 7)": with_entry(math.nan),
    "got -inf (sample 7)": with_entry(-math.inf),
    "support targets: expected labels 0 to 2, got 1 to 3":
        episode()._replace(support_targets=LABELS + 1),
    "query targets: expected labels 0 to 2, got -1 to 1":
        episode()._replace(query_targets=LABELS - 1),
    "query targets: expected finite numbers, got inf (sample 0)":
        episode()._replace(query_targets=torch.full((6, 1), math.inf)),
}  # fmt: skip


def repeated(*tasks: Episode, skip: bool = False, say: Any = print) -> TaskStream:
    """A stream of these, over and over."""
    stream = TaskStream(None, 2, 3, 0, "test", skip, say)
    stream._draw = cycle(tasks).__next__  # type: ignore[method-assign]
    return stream


@pytest.mark.parametrize("expected", FAULTS)
def test_wrong_data_are_named(expected: str) -> None:
    assert fault(episode(), 3) is None and fault(bad_episode(), 3) is None  # large, and finite
    assert expected in (fault(FAULTS[expected], 3) or "")


def test_a_stream_stops_at_a_bad_task_and_says_which() -> None:
    stream = repeated(episode(), with_entry(math.nan))
    stream.sample()
    with pytest.raises(UserError, match=r"^test task 2: inputs: .*nan.*on_bad_task=skip$"):
        stream.sample()
    with pytest.raises(UserError, match="^iteration 3, task 4: inputs"):
        stream.sample()
        stream.sample("iteration 3, task 4")


def test_a_stream_takes_the_next_task_instead_and_counts() -> None:
    said: list[str] = []
    good, bad = episode(), with_entry(math.nan)
    stream = repeated(bad, good, bad, bad, good, skip=True, say=said.append)
    assert [stream.sample() is good for _ in range(2)] == [True, True]
    assert stream.skipped == len(said) == 3 and "skipped test task 2" in said[-1]


def test_a_stream_of_bad_tasks_ends() -> None:
    stream = repeated(with_entry(math.nan), skip=True)
    with pytest.raises(UserError, match=f"got {MOST_IN_A_ROW} bad ones in a row"):
        stream.sample()


def meta_learner(said: list[str], skip: bool, lr: float = 0.1) -> MetaLearner:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False))
    head = ImplicitCGHead(nn.Linear(4, 3), lr, l2=1.0, inner=GradientDescent(), max_error=1e9)
    algorithm = HeadOnly(backbone, head, 5, nn.CrossEntropyLoss())
    algorithms = Algorithms(algorithm, algorithm, backbone, head.module)
    rest = (MEASURES["classification"], "sgd", 0.1, False)
    return MetaLearner(algorithms, *rest, skip=skip, say=said.append)


def bad_episode() -> Episode:
    """Finite data, whose sum and with it the batch's mean is not."""
    return Episode(torch.full((12, 5), 3e38), LABELS, LABELS)


def gradients(learner: MetaLearner) -> list[Tensor]:
    return [p.grad.clone() for p in learner.parameters if p.grad is not None]


def test_a_skipped_task_leaves_the_mean_of_the_others() -> None:
    torch.manual_seed(1)
    good, said = [episode(), episode()], []
    reference, learner = meta_learner([], False), meta_learner(said, True)
    reference.hypergradient(good)
    results = learner.hypergradient([good[0], bad_episode(), good[1]])
    assert [result is None for result in results] == [False, True, False]
    pairs = zip(gradients(reference), gradients(learner), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    buffers = zip(*(x.algorithms.backbone.buffers() for x in (reference, learner)), strict=True)
    assert all(torch.equal(a, b) for a, b in buffers)
    assert len(said) == 1 and said[0].startswith("skipped task 2 of 3: loss: expected a finite")


def test_a_step_counts_what_it_skipped() -> None:
    learner = meta_learner([], True)
    step = learner.step([episode(), bad_episode(), bad_episode(), episode()])
    assert step["skipped_tasks"] == 2 and math.isfinite(step["hypergradient_norm"])
    assert "skipped_tasks" not in meta_learner([], False).step([episode()])


def test_a_batch_without_a_good_task_diverges_with_theta_untouched() -> None:
    learner = meta_learner([], True)
    before = [p.clone() for p in learner.parameters]
    with pytest.raises(Diverged, match="got 2 that cannot"):
        learner.step([bad_episode(), bad_episode()])
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True))


def test_without_skipping_the_task_and_the_quantity_are_named() -> None:
    with pytest.raises(Diverged, match="^task 3 of 3: loss: expected a finite number"):
        meta_learner([], False).step([episode(), episode(), bad_episode()])
    with pytest.raises(Diverged, match=r"^task 1 of 2: (loss|inner gradient): expected .*"):
        meta_learner([], False, lr=1e30).step([episode(), episode()])


def test_evaluation_skips_too() -> None:
    learner, stream = meta_learner([], True), repeated(episode(), bad_episode())
    score = learner.evaluate(stream, 6, iter)
    assert learner.skipped == 3 and 0.0 <= score.mean <= 1.0
    with pytest.raises(Diverged, match="^task 2 of 6: "):
        meta_learner([], False).evaluate(stream, 6, iter)


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth task of every stream holds a nan."""
    whole, last = TaskStream._draw, cycle([False] * 4 + [True])

    def draw(self: Any) -> Episode:
        task = whole(self)
        if next(last):
            task.inputs[0] = math.nan
        return task

    monkeypatch.setattr(TaskStream, "_draw", draw)


def run_train(*words: str) -> Run:
    from experiments.train import ex

    updates = dict(word.split("=") for word in words)
    config = {"iterations": 2, "meta_batch": 4, "validation_tasks": 3, "test_tasks": 6, **updates}
    return ex.run(None, config, ["smoke"], options={"--unobserved": True, "--loglevel": "ERROR"})


def test_a_run_skips_and_counts(spoilt: None, tmp_path: Any) -> None:
    result = run_train("on_bad_task=skip", f"output={tmp_path}").result
    assert result["skipped_tasks"] == 4  # of 8 for training, 3 for validation, 6 for the test
    assert result["diverged"] is None and 0.0 <= result["test_accuracy"] <= 1.0


def test_a_run_stops_and_says_where(spoilt: None, tmp_path: Any) -> None:
    with pytest.raises(UserError, match="^outer iteration 2, task 1 of 4: inputs: .*nan"):
        run_train(f"output={tmp_path}")


def test_history_knows_each_iteration_again() -> None:
    """Whatever is recorded seldom, twice in one iteration, or of an earlier one."""
    history, again = History(), History()
    at = {"every": [1, 2, 3, 4], "seldom": [2, 4], "odd": [3, 3, 1, 2]}
    for name, iterations in at.items():
        for value, iteration in enumerate(iterations):
            history.add({name: value + 0.5}, iteration)
    again.load_state_dict(history.state_dict())
    found = [(name, iteration, value + 0.5) for name, iterations in at.items()
             for value, iteration in enumerate(iterations)]  # fmt: skip
    assert list(history.points()) == list(again.points()) == found


def test_history_keeps_whole_numbers_whole() -> None:
    history, again = History(), History()
    for step, values in enumerate([{"n": 1, "x": 0.5}, {"n": 2**40, "x": math.nan}], 1):
        history.add(values, step)
    again.load_state_dict(history.state_dict())
    found = [("n", 1, "1"), ("n", 2, str(2**40)), ("x", 1, "0.5"), ("x", 2, "nan")]
    assert [(n, i, repr(v)) for n, i, v in again.points()] == found
    again.add({"n": 0.5}, 7)
    assert list(again.values("n")) == [1.0, 2.0**40, 0.5] and not len(again.values("none"))
