"""The paper's tiling in plain PyTorch: any device, any sizes, linear in the sequence length."""
