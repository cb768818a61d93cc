"""How wide a verify pass may be; `controller.py` says how wide one is."""

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # for which a CUDA graph is worth its memory
MAX_ROWS = 17  # of a block: sixteen drafted tokens behind their anchor
