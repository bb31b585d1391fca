"""How each operation is computed: one package a backend, with a ``Backend`` that holds its seven functions."""
