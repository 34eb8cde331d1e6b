"""Comparing models and trainings: benchmarks, checks, plots and reports."""
