"""The edits of one model over months: a folder to which edits are added, and from which each can be
taken out exactly.

book.py is the `Ledger`, history.py what has happened, names.py how entries and facts are named,
origin.py on which weights an edit was made, conflicts.py which facts are in each other's way.
"""

from engram.ledger.book import Ledger

__all__ = ["Ledger"]
