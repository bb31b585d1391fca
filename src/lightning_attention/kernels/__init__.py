"""How each operation is computed: a package for each backend, whose ``BACKEND`` has the same functions."""
