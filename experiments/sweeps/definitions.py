"""The sweeps by name. To add one, add an entry to `SWEEPS`.

In `accuracy` everybody has three candidates: two values of the inner setting that matters most for
the method (a step size; the regulariser where the inner problem is solved anyway), and a larger
outer step size with the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from experiments.sweeps.definition import Benchmark, Grid, Method, Settings, Sweep


def _three(key: str, usual: float, other: float, meta_lr: float = 0.003) -> Grid:
    """Two inner values with the method's outer step size, and the first with a larger one."""
    return ({key: usual}, {key: other}, {key: usual, "meta_lr": meta_lr})


LR, L2 = "algorithm.lr", "algorithm.l2"

# These also go on to 1,500 outer iterations, for a comparison at equal iterations; what counts is
# their test accuracy at the end of the budget, as everybody's.
HEAD_ONLY = {"test_at": [1500]}

# Measured: the two engines tie in second order, and learn2learn's is faster in first order.
FASTER = {"algorithm.engine": "learn2learn"}

# Measured on one core: second derivatives of the whole network take 0.8 of the time in the default
# layout; imaml_gd takes the same in both, the other methods longer.
OWN_LAYOUT = {"model.channels_last": False}

# What imaml_* had by default when these cells ran, with the Hessian; today's defaults are others.
DAMPED = {"algorithm.damping": 20.0}

# A task costs it a second, and validations are not part of the budget.
SELDOM = {"validate_seconds": 60, "validation_tasks": 50}


def _beside(config: str, settings: Settings, methods: Mapping[str, Settings],
            test_tasks: int = 200) -> Benchmark:
    """A benchmark beside the two main ones: a quarter of the budget, fewer test tasks.

    Theta of the best validation is tested too, which the two main ones were run without.
    """
    grid = {"budget": 30, "test_tasks": 10, "validate_seconds": 15}
    final = {"test_tasks": test_tasks, "test_at": [], "early_stopping": True}
    return Benchmark((config,), settings, "", grid, {**grid, "budget": 60, **final}, methods)


# With one validation, at the end, theta of the best one is the last.
ONCE = {**SELDOM, "validation_tasks": 25, "early_stopping": False}
FEW = {"imaml_hf": {**ONCE, "test_tasks": 50}}
RARE = {"validate_seconds": 30, "validation_tasks": 25, "test_tasks": 50}
FEWER = {
    **dict.fromkeys(("maml", "fomaml", "reptile"), RARE),
    "imaml_gd": {**ONCE, "test_tasks": 25},
    "imaml_hf": {**ONCE, "validation_tasks": 10, "test_tasks": 10},
}

MEDIUM = {"tasks.level": "medium"}
ACCURACY = Sweep(
    methods={
        "rm_metal": Method(("rm_metal",), _three(L2, 0.1, 0.3), final=HEAD_ONLY),
        "itd_bio": Method(("itd_bio",), _three(LR, 0.1, 0.03), final=HEAD_ONLY),
        "anil": Method(("anil",), _three(LR, 0.1, 0.03), {}, FASTER, HEAD_ONLY),
        "rm_metal_paper": Method(("rm_metal", "paper"), _three(LR, 0.1, 0.03, 0.3),
                                 final=HEAD_ONLY),
        "rm_metal_as_released": Method(("rm_metal", "as_released"), _three(LR, 0.1, 0.03),
                                       final=HEAD_ONLY),
        "fo_anil": Method(("fo_anil",), _three(LR, 0.3, 0.1), {}, FASTER, HEAD_ONLY),
        "maml": Method(("maml",), _three(LR, 0.1, 0.5), settings={**FASTER, **OWN_LAYOUT}),
        "fomaml": Method(("fomaml",), _three(LR, 0.1, 0.5), settings=FASTER),
        "reptile": Method(("reptile",), _three(LR, 0.05, 0.1, 1.0)),
        "imaml_gd": Method(("imaml_gd",), _three(LR, 0.1, 0.05), settings=DAMPED),
        "imaml_hf": Method(("imaml_hf",), _three(L2, 2.0, 0.5),
                           settings={**SELDOM, **OWN_LAYOUT, **DAMPED}),
    },
    benchmarks={
        "caltech101": Benchmark(("caltech101",), {"tasks.size": 32}),
        "glyphs": Benchmark(("glyphs",), {**MEDIUM, "tasks.split": "random"}),
        "glyphs_script": _beside("glyphs", {**MEDIUM, "tasks.split": "script"}, FEW),
        # five alphabets as one folder of classes: docs/tasks.md
        "omniglot5": _beside("folder", {"tasks.size": 28}, FEW),
        # A task costs seven times what it does with 32 pixels.
        "caltech101_84": _beside("caltech101", {"tasks.size": 84, "meta_batch": 2,
                                                "validation_tasks": 50}, FEWER, test_tasks=100),
    },
    settings={
        "model.hidden": 32, "tasks.ways": 5, "tasks.shots": 5, "meta_batch": 8,
        "iterations": 100_000,  # the budget ends the run
        "budget_clock": "cpu", "validate_seconds": 30, "threads": 1,
    },
    stage1={"budget": 120, "test_tasks": 100},
    stage2={"budget": 240},
)

# Other regularisers of the inner problem, outside the comparison of `accuracy`, whose two rows at
# the top are its runs: their grids chose these settings on Caltech-101. First-order ANIL gets the
# same freedom: the settings that its grid did not choose, for the whole budget.
REGULARISERS = Sweep(
    methods={
        "rm_metal": Method(("rm_metal",), ({L2: 0.1, "meta_lr": 0.003},), final=HEAD_ONLY),
        "fo_anil": Method(("fo_anil",), ({LR: 0.3, "meta_lr": 0.003},), {}, FASTER, HEAD_ONLY),
        "slower": Method(("rm_metal",), ({L2: 0.1, "meta_lr": 0.001},)),
        "stronger": Method(("rm_metal",), ({L2: 0.3, "meta_lr": 0.001},)),
        "strongest": Method(("rm_metal",), ({L2: 1.0, "meta_lr": 0.001},)),
        "learned": Method(("rm_metal",), ({"algorithm.learn_l2": True, "meta_lr": 0.001},)),
        "fo_anil_slower": Method(("fo_anil",), ({LR: 0.3, "meta_lr": 0.001},), settings=FASTER),
        "fo_anil_gentler": Method(("fo_anil",), ({LR: 0.1, "meta_lr": 0.001},), settings=FASTER),
    },
    benchmarks={"caltech101": ACCURACY.benchmarks["caltech101"]},
    settings=ACCURACY.settings,
    stage2=ACCURACY.stage2,
)

# Yang et al., appendix C.2: the values searched for Algorithm 1 and, without N, for ITD-BiO.
COUNTS = (5, 10, 15, 20)
INNER = (0.01, 0.05, 0.1, 0.5)
OUTER = (1e-4, 1e-3, 1e-2, 0.1)
SEARCHED = tuple(
    {"algorithm.steps": k, "algorithm.cg_steps": n, "algorithm.lr": phi, "meta_lr": theta}
    for k, n, phi, theta in product(COUNTS, COUNTS, INNER, OUTER)
)
SEARCHED_ITD = tuple(
    {"algorithm.steps": k, "algorithm.lr": phi, "meta_lr": theta}
    for k, phi, theta in product(COUNTS, INNER, OUTER)
)

# Algorithm 1 as printed, with the inner sizes that the paper prints; `ADAM` is the outer step of
# the released code.
PRINTED = Method(("yang_{benchmark}_rm_metal",), grids={"paper": SEARCHED})
ADAM = {"meta_optimizer": "adam", "meta_lr": 1e-4}
PAPERS_K = {"algorithm.steps": 20, "algorithm.test_steps": 20}
MAIN = {
    "rm_metal": Method(("rm_metal",), _three(L2, 0.1, 0.3)),
    "anil": Method(("anil",), _three(LR, 0.1, 0.03),
                   settings={**FASTER, "algorithm.test_steps": 20}),
    "itd_bio": Method(("itd_bio",), _three(LR, 0.1, 0.03), {"paper": SEARCHED_ITD}),
}

# Yang et al., Tables 1 and 2, Figure 1: 2,000 outer iterations of 32 tasks, 5-way 5-shot, a test
# on 600 tasks after 20 inner steps. The step sizes are from grids of equal size and time, or the
# paper's. A grid's runs are the same in all of these sweeps.
YANG_TABLE1 = Sweep(
    methods={
        **MAIN,
        "rm_metal_printed_adam": replace(PRINTED, settings=ADAM),
        "rm_metal_as_released": Method(("rm_metal", "as_released"), settings={**PAPERS_K, **ADAM}),
        "rm_metal_printed": replace(PRINTED, final={"budget": 600}),  # enough to see what it does
        "maml_printed": Method(("yang_{benchmark}_maml",), settings={**FASTER, **OWN_LAYOUT}),
    },
    benchmarks={name: Benchmark((name,), like=name)
                for name in ("cifarfs", "fc100", "mini_imagenet", "tiered_imagenet")},
    settings={"meta_batch": 32, "iterations": 2000, "test_tasks": 600, "validate_seconds": 20,
              "budget_clock": "cpu", "threads": 1},
    stage1={"budget": 150, "test_tasks": 10, "validate_seconds": 75},
    stage2={"early_stopping": True},
)

# A quarter of those tasks, where more methods can be paid: the whole-network one gets the time
# that the others take.
YANG_QUARTER = replace(
    YANG_TABLE1,
    methods={
        **MAIN,
        "fo_anil": Method(("fo_anil",), _three(LR, 0.3, 0.1),
                          settings={**FASTER, "algorithm.test_steps": 20}),
        "r2d2": Method(("r2d2",), _three(L2, 0.1, 1.0)),
        "logistic": Method(("logistic",), _three(L2, 0.1, 0.3)),
        # there is no inner setting
        "protonet": Method(("protonet",), tuple({"meta_lr": lr} for lr in (0.001, 0.0003, 0.003))),
        "maml": Method(("maml",), _three(LR, 0.1, 0.5), settings={**FASTER, **OWN_LAYOUT},
                       final={"budget": 900}),
    },
    benchmarks={name: YANG_TABLE1.benchmarks[name] for name in ("cifarfs", "fc100")},
    stage2={"early_stopping": True, "iterations": 500},
)

SWEEPS = {
    "accuracy": ACCURACY,
    "regularisers": REGULARISERS,
    "yang_table1": YANG_TABLE1,
    "yang_quarter": YANG_QUARTER,
    "smoke": Sweep({"rm_metal": Method(())}, {"glyphs": Benchmark(("smoke",))}, seeds=2),
}
