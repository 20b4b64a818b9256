"""Where work is done, and which model a result is about."""
