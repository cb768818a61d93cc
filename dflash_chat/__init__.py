"""Terminal chat for local LLMs with an embedded DFlash speculative-decoding runtime."""

__version__ = "0.1.0"
