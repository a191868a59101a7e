"""The papers' figures, drawn again: each experiment is `python -m experiments.papers.NAME`."""
