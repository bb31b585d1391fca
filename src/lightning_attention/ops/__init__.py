"""What each operation means to a caller."""
