"""The memory bank: a folder of keys, values and texts that can be searched without torch."""

from tinyalign_edge.memory.bank import Bank, Entry
from tinyalign_edge.memory.search import Neighbours
from tinyalign_edge.memory.write import write_bank

__all__ = ["Bank", "Entry", "Neighbours", "write_bank"]
