"""Implementations of others, a file each, with ``PEERS``: what ``--peers`` means by the file's name."""
