"""A sweep of one real training, to which `train_process` lets something happen."""

from experiments.sweeps.definition import Benchmark, Method, Sweep

SMALL = {"tasks.level": "easy", "model.hidden": 8, "meta_batch": 2, "validation_tasks": 4,
         "test_tasks": 8, "iterations": 16, "validate_every": 8}  # fmt: skip
SWEEP = Sweep(
    methods={"rm_metal": Method(("glyphs",), settings=SMALL)},
    benchmarks={"glyphs": Benchmark()},
    seeds=1,
    module="train_process",
)
