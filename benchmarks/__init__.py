"""Measures every op of the registry against what the machine allows and against what one would use instead.

`python -m twotower_ext.benchmarks`, `twotower bench` or `make bench`; docs/benchmarking.md has the method. Installed as
`twotower_ext.benchmarks`, and never imported by `twotower_ext` itself.
"""
