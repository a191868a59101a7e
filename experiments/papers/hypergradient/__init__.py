"""The error of the hypergradient over inner steps: Rajeswaran et al. (2019), Figure 2a.

    python -m experiments.papers.hypergradient
    python -m experiments.papers.hypergradient with quick

On an ill-conditioned linear regression iMAML against MAML, as in the paper; on a logistic head
Algorithm 1 of Yang et al. (2025) against iterative differentiation.
"""

from experiments import extra  # noqa: F401  (says what to install)
