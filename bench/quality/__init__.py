"""Quality at equal bytes: every method, fit and peer at the same budgets of bytes on disk.

`python -m bench.quality` measures cells, `python -m bench.report` makes tables and plots of them.
"""
