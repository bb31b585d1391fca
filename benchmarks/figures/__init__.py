"""The drawings of the documentation, each made by ``python -m benchmarks.figures NAME``."""
