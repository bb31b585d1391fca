"""Everything that is measured from a checkout: ``python -m benchmarks <case>``.

``cases/`` has what is measured, ``peers/`` the implementations of others, both found by the names of their files;
``harness/`` what they share. The protocol of a case, the report and the renderer are those of the package's own run
against sequence length, ``lightning_attention.bench``.
"""
