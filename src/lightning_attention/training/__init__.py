"""Train a small TransNormer on text: configuration, data, trainer, checkpoints."""
