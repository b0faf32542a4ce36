"""Answering on the device; no torch."""
