"""Many runs of one experiment: what they are, who runs which, and what is still missing.

Read `cells` (one run and its identity), `definition` and `definitions` (which runs a sweep has),
`plan` and `board` (where each of them stands), `claims` (who runs what), `worker`, `coordinator`.
"""
