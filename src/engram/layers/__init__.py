"""Which layer of a model to edit: measured by edits at every layer, kept as a card.

candidates.py finds facts to edit, evidence.py traces and edits them, card.py is the value that
holds the numbers and what follows from them, choice.py keeps cards and answers layer="auto".
"""
