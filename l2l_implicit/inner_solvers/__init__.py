"""Solvers of the inner problem: steps on a linearization, and the loop around them."""
