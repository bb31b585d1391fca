"""The command `lightning-attention`. Each command loads what it needs when it runs."""
