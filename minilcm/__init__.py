"""minilcm: the readable reference implementation of LCM-LoRA (arXiv 2311.05556)."""

__version__ = "0.1.0"
