"""Files and folders on disk; nothing here knows models."""
