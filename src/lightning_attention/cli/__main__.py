"""`python -m lightning_attention.cli`."""

from lightning_attention.cli.app import main

main()
