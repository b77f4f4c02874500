"""Traces, replays, predictions of speed, pictures."""
