"""Models, each a room of its own; importing this package imports none of them."""

from lightning_attention.models.presets import preset

__all__ = ["preset"]
