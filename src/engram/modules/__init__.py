"""What a torch model consists of; nothing here knows text."""
