"""How each operation is computed: one package a backend, with the same functions in each."""
