"""Models, each a room of its own; importing this package imports none of them."""
