"""Entry points for users: the command line, the chat widget, the notebooks' helpers."""
