"""A run: what is checked before it starts, and its folder."""
