"""The paper, measured: one file a question; run by `python -m paper`."""
