"""The definition in float64: slow and obvious, on any device. Every other backend is tested against it."""
