"""Training: the only part, with export, that needs torch."""
