"""Models, each in a package of its own; importing this one imports none of them."""

from lightning_attention.models.presets import preset

__all__ = ["preset"]
