"""Thousands of edits, each measured by itself: what is measured, how it is computed in batches, and
where the results are stored.
"""
