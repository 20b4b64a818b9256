"""Thousands of edits, each by itself, measured: what is asked, how it is computed in batches, where
results are kept.
"""
