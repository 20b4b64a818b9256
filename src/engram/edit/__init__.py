"""Edits as values: what changes in which weight, how it is applied, stored and exported."""
