"""`python -m tinyalign_edge` is the command line."""

from tinyalign_edge.cli import main

main()
