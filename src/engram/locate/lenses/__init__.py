"""Readings of states and weights in the vocabulary: lens, refinement, memories."""
