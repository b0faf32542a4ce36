"""The latency benchmark of a bundle on this device; needs the base dependencies alone."""
