"""Bytes: formats, files, checkpoints, the hub."""
