"""Builds `l2l_implicit/tasks/glyphs.npz` from pinned typeface packages.

Install `requirements.txt` of this folder into a fresh environment, then run
`python -m experiments.build_glyphs` from the repository root.
"""
