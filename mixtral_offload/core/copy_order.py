"""When copies are due, and in how many chunks they travel."""

NOW = -1  # due before any prediction
CHUNKS = 16  # of one expert
