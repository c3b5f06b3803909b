"""minilcm: the readable reference implementation of LCM-LoRA (arXiv 2311.05556)."""

__version__ = "0.2.0.dev0"
