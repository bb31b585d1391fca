"""The quick run of ``lightning-attention bench``: time and memory against sequence length, and how they are measured.

Every other measurement is a case of ``benchmarks/`` in the repository, which uses the same protocol and renderer.
"""
