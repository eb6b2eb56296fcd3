"""Measurements of speed, memory and cost; each module is a command line: `python -m benchmarks.NAME --help`."""
