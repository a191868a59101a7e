"""What an outer step costs, in units of one supervised step on the same images.

    python -m experiments.benchmark                     # the whole table
    python -m experiments.benchmark with quick          # most of it, under a minute
    python -m experiments.benchmark with cases=peers,imaml

Every method sees the same backbone and the same images. Repetitions are interleaved, in an order
drawn anew for each; times are medians, ratios medians of the ratios within a repetition, memory is
the peak of live tensors beyond those alive before the step.
"""

from experiments import extra  # noqa: F401, I001  (says what to install)
import l2l_implicit  # noqa: F401  (first: it makes learn2learn importable)
