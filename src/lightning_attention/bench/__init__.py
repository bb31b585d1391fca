"""What ``lightning-attention check`` and ``lightning-attention bench`` measure, record and draw."""
