"""Accuracy of the information estimates on samples whose information is known, beside other packages' estimates.

See `python -m bench.mi --help` and docs/measuring_accuracy.md.
"""
