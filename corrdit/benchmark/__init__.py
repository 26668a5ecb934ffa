"""Speed and memory of the operations against other ways to compute them; correctness is checked before any timing.

The rivals are in `benchmarks/baselines/`, installed as `corrdit.benchmark.baselines`.
"""
