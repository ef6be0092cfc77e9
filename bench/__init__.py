"""Benchmarks: every ratio of docs/benchmarks.md, measured side by side with baselines that must be right themselves."""
