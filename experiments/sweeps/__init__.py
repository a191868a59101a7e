"""Many runs of one experiment: what they are, which are missing, and how Dask runs those.

Read `definition` and `definitions` (which runs a sweep has), `plan`, `listing` (where each of them
stands), `run` (a Dask worker's part), `lock` (no cell runs twice at a time).
"""
