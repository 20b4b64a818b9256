"""Benchmark records: what is edited and what is asked afterwards, from published files or built
anew.
"""
