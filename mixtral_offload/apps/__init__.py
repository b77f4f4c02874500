"""What people start: the command line, the widget, what the notebooks share."""
