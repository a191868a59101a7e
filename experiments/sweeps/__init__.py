"""Many runs of one experiment: what they are, which are missing, and how Dask runs those.

Read `cells` (one run and its identity), `definition` and `definitions` (which runs a sweep has),
`plan`, `records` (where each of them stands), `schedule` (the sweep's own process), `run` (a Dask
worker's part), `lock` (no cell runs twice at a time).
"""
