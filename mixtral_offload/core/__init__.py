"""Decisions: policies, placement, traces, costs. No torch, no transformers, no threads."""
