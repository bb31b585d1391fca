"""One sequence over many processes."""
