"""The loop over the blocks of a sequence: one that any chip runs, and one for each chip that has more to give."""
