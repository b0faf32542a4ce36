"""One file an engine: how it takes a checkpoint, and how it is driven. Each is run in an environment that has it."""
