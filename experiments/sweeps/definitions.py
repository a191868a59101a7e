"""The sweeps by name. To add one, add an entry to `SWEEPS`.

In `accuracy` everybody has three candidates: two values of the inner setting that matters most for
the method (a step size; the regulariser where the inner problem is solved anyway), and a larger
outer step size with the first of them.

A cell is known by the words of its command line: those of recorded ones stay, such as ``rm_metal``
for ImplicitCGHead.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import nan

from experiments.sweeps.definition import Benchmark, Grid, Method, Published, Sweep


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
# layout; ImplicitMAML takes the same in both, the other methods longer.
OWN_LAYOUT = {"model.channels_last": False}
# What ImplicitMAML had by default, with the Hessian, when these cells ran.
DAMPED = {"algorithm.damping": 20.0}
# A task costs it a second, and validations are not part of the budget.
SELDOM = {"validate_seconds": 60, "validation_tasks": 50}

MEDIUM = {"tasks.level": "medium"}
ACCURACY = Sweep(
    methods={
        "ImplicitCGHead": Method(("rm_metal",), _three(L2, 0.1, 0.3), final=HEAD_ONLY),
        "itd_bio": Method(("itd_bio",), _three(LR, 0.1, 0.03), final=HEAD_ONLY),
        "anil": Method(("anil",), _three(LR, 0.1, 0.03), {}, FASTER, HEAD_ONLY),
        "as_printed": Method(("rm_metal", "paper"), _three(LR, 0.1, 0.03, 0.3), final=HEAD_ONLY),
        "as_released": Method(("rm_metal", "as_released"), _three(LR, 0.1, 0.03), final=HEAD_ONLY),
        "fo_anil": Method(("fo_anil",), _three(LR, 0.3, 0.1), {}, FASTER, HEAD_ONLY),
        "maml": Method(("maml",), _three(LR, 0.1, 0.5), settings={**FASTER, **OWN_LAYOUT}),
        "fomaml": Method(("fomaml",), _three(LR, 0.1, 0.5), settings=FASTER),
        "reptile": Method(("reptile",), _three(LR, 0.05, 0.1, 1.0)),
        "ImplicitMAML": Method(("imaml_gd",), _three(LR, 0.1, 0.05), settings=DAMPED),
        "ImplicitMAML_HF": Method(("imaml_hf",), _three(L2, 2.0, 0.5),
                                  settings={**SELDOM, **OWN_LAYOUT, **DAMPED}),
    },
    benchmarks={
        "caltech101": Benchmark(("caltech101",), {"tasks.size": 32}),
        "glyphs": Benchmark(("glyphs",), {**MEDIUM, "tasks.split": "random"}),
    },
    settings={
        "model.hidden": 32, "tasks.ways": 5, "tasks.shots": 5, "meta_batch": 8,
        "iterations": 100_000,  # the budget ends the run
        "budget_clock": "cpu", "validate_seconds": 30, "threads": 1,
    },
    stage1={"budget": 120, "test_tasks": 100},
    stage2={"budget": 240},
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
TESTED = {**FASTER, "algorithm.test_steps": 20}
MAIN = {
    "ImplicitCGHead": Method(("rm_metal",), _three(L2, 0.1, 0.3)),
    "anil": Method(("anil",), _three(LR, 0.1, 0.03), settings=TESTED),
    "itd_bio": Method(("itd_bio",), _three(LR, 0.1, 0.03), {"paper": SEARCHED_ITD}),
}
YANG_METHODS = {
    **MAIN,
    "as_printed_adam": replace(PRINTED, settings=ADAM),
    "as_released": Method(("rm_metal", "as_released"), settings={**PAPERS_K, **ADAM}),
    "as_printed": replace(PRINTED, final={"budget": 600}),  # enough to see what it does
    "maml_printed": Method(("yang_{benchmark}_maml",), settings={**FASTER, **OWN_LAYOUT}),
}


def _printed(*rows: tuple[float, float, float]) -> dict[str, Published]:
    """Of Tables 1 and 2, on one benchmark: Algorithm 1, ANIL, ITD-BiO, MAML."""
    ours, anil, itd_bio, maml = (Published(*row) for row in rows)
    algorithm_1 = ("ImplicitCGHead", *(name for name in YANG_METHODS if name.startswith("as_")))
    return {**dict.fromkeys(algorithm_1, ours), "anil": anil, "itd_bio": itd_bio,
            "maml_printed": maml}  # fmt: skip


# Where a third of the images are at hand, and a step of 32 tasks takes eight seconds of a core.
A_PART = {"meta_batch": 8, "iterations": 100_000, "budget": 900, "validate_seconds": 60,
          "validation_tasks": 100}
MINI_IMAGENET = _printed((59.58, 1.08, 739.62), (57.80, 1.14, 1639.85), (55.58, 1.31, 3031.51),
                         (43.33, 0.95, 10065.83))  # fmt: skip
# Yang et al., Tables 1 and 2, Figure 1: 2,000 outer iterations of 32 tasks, 5-way 5-shot, a test
# on 600 tasks after 20 inner steps. The step sizes are from grids of equal size and time, or the
# paper's. A grid's runs are the same in all of these sweeps.
YANG_TABLE1 = Sweep(
    methods=YANG_METHODS,
    benchmarks={
        **{name: Benchmark((name,), like=name)
           for name in ("cifarfs", "fc100", "mini_imagenet", "tiered_imagenet")},
        "mini_imagenet_part": Benchmark(("mini_imagenet",), A_PART, "mini_imagenet"),
    },
    settings={"meta_batch": 32, "iterations": 2000, "test_tasks": 600, "validate_seconds": 20,
              "budget_clock": "cpu", "threads": 1},
    stage1={"budget": 150, "test_tasks": 10, "validate_seconds": 75},
    stage2={"early_stopping": True},
    published={
        "cifarfs": _printed((64.24, 1.41, 832.40), (63.52, 1.31, 1130.16), (63.69, 1.10, 1740.76),
                            (54.85, 1.23, nan)),
        "fc100": _printed((48.52, 1.13, 621.67), (47.70, 0.95, 879.33), (47.88, 0.74, 1607.74),
                          (47.50, 1.06, 2638.45)),
        "mini_imagenet": MINI_IMAGENET,
        "mini_imagenet_part": MINI_IMAGENET,
        "tiered_imagenet": _printed((61.97, 0.86, 693.46), (58.16, 0.94, 1417.64),
                                    (60.78, 0.10, 2059.43), (48.37, 1.17, 9453.75)),
    },
)

# A quarter of those tasks, where more methods can be paid: those of the whole network get the time
# that the others take.
PAID = {"budget": 900}
YANG_QUARTER = replace(
    YANG_TABLE1,
    methods={
        **MAIN,
        "fo_anil": Method(("fo_anil",), _three(LR, 0.3, 0.1), settings=TESTED),
        "r2d2": Method(("r2d2",), _three(L2, 0.1, 1.0)),
        "logistic": Method(("logistic",), _three(L2, 0.1, 0.3)),
        # there is no inner setting
        "protonet": Method(("protonet",), tuple({"meta_lr": lr} for lr in (0.001, 0.0003, 0.003))),
        "maml": Method(("maml",), _three(LR, 0.1, 0.5), settings={**FASTER, **OWN_LAYOUT},
                       final=PAID),
        "maml_msl": Method(("maml_msl",), _three(LR, 0.1, 0.5), settings=OWN_LAYOUT, final=PAID),
        "meta_sgd": Method(("meta_sgd",), _three(LR, 0.1, 0.5), settings=OWN_LAYOUT, final=PAID),
    },
    benchmarks={name: YANG_TABLE1.benchmarks[name] for name in ("cifarfs", "fc100")},
    stage2={"early_stopping": True, "iterations": 500},
)

# Finn et al. (2017), appendix A.1, to which Rajeswaran et al. refer.
FINN = {5: {LR: 0.4, "algorithm.steps": 1, "algorithm.test_steps": 3},
        20: {LR: 0.1, "algorithm.steps": 5, "algorithm.test_steps": 5}}  # fmt: skip
# Rajeswaran et al., Table 2: MAML, first-order MAML, Reptile, iMAML with gradient descent and
# Hessian-free.
PRINTED_ON_OMNIGLOT = {
    (5, 1): ((98.7, 0.4), (98.3, 0.5), (97.68, 0.04), (99.16, 0.35), (99.50, 0.26)),
    (5, 5): ((99.9, 0.1), (99.2, 0.2), (99.48, 0.06), (99.67, 0.12), (99.74, 0.11)),
    (20, 1): ((95.8, 0.3), (89.4, 0.5), (89.43, 0.14), (94.46, 0.42), (96.18, 0.36)),
    (20, 5): ((98.9, 0.2), (97.9, 0.1), (97.12, 0.32), (98.69, 0.1), (99.14, 0.1)),
}

# Equal time for all, two hours of a core; the inner settings are those of the papers, or for iMAML
# those that learn (docs/choosing.md).
OMNIGLOT_METHODS = {
    "maml": Method(("maml",), settings={**FASTER, **OWN_LAYOUT}),
    "fomaml": Method(("fomaml",), settings=FASTER),
    "reptile": Method(("reptile",)),
    "ImplicitMAML": Method(("ImplicitMAML",), settings=OWN_LAYOUT),
    "ImplicitMAML_HF": Method(("ImplicitMAML_HF",), settings=OWN_LAYOUT),
}
RAJESWARAN_TABLE2 = Sweep(
    methods=OMNIGLOT_METHODS,
    benchmarks={
        f"omniglot_{ways}way_{shots}shot": Benchmark(
            ("omniglot",),
            {"tasks.ways": ways, "tasks.shots": shots, "tasks.test_queries": shots},
            methods=dict.fromkeys(("maml", "fomaml"), FINN[ways]),
        )
        for ways, shots in PRINTED_ON_OMNIGLOT
    },
    settings={"iterations": 100_000, "budget_clock": "cpu", "threads": 1, "validate_seconds": 300,
              "model.name": "omniglot_cnn", "meta_lr_schedule": "cosine"},
    stage2={"budget": 7200, "early_stopping": True},
    published={
        f"omniglot_{ways}way_{shots}shot": {
            name: Published(*row, nan) for name, row in zip(OMNIGLOT_METHODS, rows, strict=True)
        }
        for (ways, shots), rows in PRINTED_ON_OMNIGLOT.items()
    },
)

SWEEPS = {
    "accuracy": ACCURACY,
    "yang_table1": YANG_TABLE1,
    "yang_quarter": YANG_QUARTER,
    "rajeswaran_table2": RAJESWARAN_TABLE2,
    "smoke": Sweep({"rm_metal": Method(())}, {"glyphs": Benchmark(("smoke",))}, seeds=2),
}
