"""Yang et al. (2025), Theorems 1 and 2 and Corollary 1, on a problem whose hypergradient is known.

    python -m experiments.papers.convergence
    python -m experiments.papers.convergence with quick
"""
