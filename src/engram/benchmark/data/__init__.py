"""Benchmark records: what is edited and measured, from published files or your own facts."""
