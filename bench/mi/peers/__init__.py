"""Other packages' estimators, each run by the interpreter of an environment of its own.

These modules import neither torch nor engine unless the package they stand for does.
"""
