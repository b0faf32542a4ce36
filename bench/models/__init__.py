"""The matrix of model families: tiny random checkpoints, each compared with torch (docs/models.md)."""
