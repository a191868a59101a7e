"""Peak memory against inner steps: Yang et al. (2025), Fig. 2; Rajeswaran et al. (2019), Fig. 2b.

    python -m experiments.papers.memory
    python -m experiments.papers.memory with quick
"""

from experiments import extra  # noqa: F401  (says what to install)
