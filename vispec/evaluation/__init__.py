"""Measuring: the benchmarks, one runner for all arms, and the comparison of their answers."""
