"""The edits of one model over months: a folder to which edits are added, and from which each can be
taken out exactly.

book.py is the `Ledger`; header.py holds what it was created with, history.py what has happened
since, stored_edits.py the files of the edits. references.py resolves the names of entries and
facts, origin.py finds the weights that an edit was made on, conflicts.py the facts that interfere,
and admission.py checks an edit before it comes into force.
"""

from engram.ledger.book import Ledger

__all__ = ["Ledger"]
