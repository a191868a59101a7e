"""The four parts as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt  # noqa: E402

from experiments.convergence.parts import Bounds, Deterministic, Stochastic, Undercut  # noqa: E402

LABELS = {"inner_steps": "inner steps K", "cg_steps": "conjugate gradient steps N"}


def draw(
    path: Path,
    all_tasks: Deterministic,
    batches: Sequence[Stochastic],
    undercut: Mapping[str, Undercut],
    bounds: Bounds,
) -> None:
    """Write the PNG."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    _theorem_2(axes[0, 0], all_tasks)
    _theorem_1(axes[0, 1], batches)
    for cell, what in zip(axes[1], LABELS, strict=True):
        _bound(cell, what, undercut[what], getattr(bounds, what))
    for cell in axes.flat:
        cell.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _theorem_2(axes: plt.Axes, found: Deterministic) -> None:
    for number, (curve, norms) in enumerate(zip(found.averages, found.norms, strict=True)):
        at = range(1, len(curve) + 1)
        axes.loglog(at, curve, color=f"C{number}", label=f"problem {number}, average")
        kept = [(t, n) for t, n in zip(at, norms, strict=True) if n > 1e-20]
        axes.loglog(*zip(*kept, strict=True), color=f"C{number}", linestyle=":", alpha=0.7)
    last = found.averages[0][-1] * len(found.averages[0])
    axes.loglog(at, [last / t for t in at], "k--", linewidth=0.8, label="slope -1")
    axes.set_ylim(bottom=1e-12)
    axes.set(xlabel="outer iterations T", ylabel=r"$\|\nabla F\|^2$: average (dotted: last)")
    axes.set_title(f"Theorem 2: slope {_show(found.slope)}")
    axes.legend()


def _theorem_1(axes: plt.Axes, found: Sequence[Stochastic]) -> None:
    for number, each in enumerate(found):
        sizes = list(each.floors)
        means = [each.floors[b].mean for b in sizes]
        widths = [each.floors[b].half_width for b in sizes]
        # an interval that reaches below zero has no lower end on this scale
        below = [min(w, 0.9 * m) for w, m in zip(widths, means, strict=True)]
        label = f"K = {each.inner_steps}: slope {_show(each.slope)}"
        axes.errorbar(sizes, means, [below, widths], fmt="o-", capsize=3, label=label)
        if number == len(found) - 1:
            axes.plot(sizes, [means[0] * sizes[0] / b for b in sizes], "k--", linewidth=0.8,
                      label="slope -1")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="tasks in a batch |B|", ylabel=r"floor of $\|\nabla F\|^2$")
    axes.set_title("Theorem 1: the floor")
    axes.legend()


def _bound(axes: plt.Axes, what: str, found: Undercut, bound: int) -> None:
    for start, by_steps in found.items():
        values = [max(value.mean, 1e-32) for value in by_steps.values()]
        axes.loglog(list(by_steps), values, "o-", label=f"{start} start")
    name = {"inner_steps": "K_0", "cg_steps": "N_0"}[what]
    axes.axvline(bound, color="0.5", linestyle="--", label=f"${name}$ = {bound}")
    axes.set(xlabel=LABELS[what], ylabel=r"last $\|\nabla F\|^2$")
    axes.set_title("Appendix B.2")
    axes.legend()


def _show(value: object) -> str:
    mean, half, _ = value  # type: ignore[misc]
    return f"{mean:.3f} ± {half:.3f}"
