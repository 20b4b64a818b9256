"""Running a model again, in part: recordings, suffixes, rows that begin alike."""
