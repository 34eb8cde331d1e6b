"""Looking and comparing: benchmarks, checks, plots and reports."""
