"""A sweep of the toy training: a method with a grid, a plain one, one that dies, one that fails."""

from experiments.sweeps.definition import Benchmark, Method, Sweep

SWEEP = Sweep(
    methods={
        "tuned": Method(("toy",), grid=({"lr": 0.1}, {"lr": 0.2}, {"lr": 0.2001})),
        "plain": Method(("toy",), settings={"lr": 0.7}),
        "dying": Method(("toy",), settings={"fault": "once"}),
        "broken": Method(("toy",), settings={"fault": "always"}),
    },
    benchmarks={"toy": Benchmark()},
    seeds=2,
    module="toy_cell",
)
