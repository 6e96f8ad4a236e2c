"""Processes that hold tensors: verifiers (the target), drafters, and the wire between them."""
