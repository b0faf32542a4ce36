"""Benchmarks and recorded runs."""
