"""What the cases share beyond ``lightning_attention.bench``."""
