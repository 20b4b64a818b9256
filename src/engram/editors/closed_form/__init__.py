"""Editors that solve for a change of weights: ROME and the mass editors, and what they share."""
