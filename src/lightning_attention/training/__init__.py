"""Train a model on text: configuration, data, trainer, checkpoints; evaluate and export it."""
