"""What the papers say of memory, of the hypergradient's error and of convergence, measured here."""

from experiments import extra  # noqa: F401  (says what to install)
