"""Text in, text out: conversations, batches, jobs."""
