"""Kernels with one public function each. Imports jax and numpy, nothing of jaxserve."""
