"""Solvers of the linear system of the hypergradient, from products alone."""
