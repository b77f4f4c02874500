"""The operating system: files, memory, and text that is safe to show."""
