"""The policy loss as pure functions on tensors, and the choices behind each of its parts."""
