"""Stubs of protos/jaxserve/v1, written by scripts/generate_protos.py: do not edit."""
