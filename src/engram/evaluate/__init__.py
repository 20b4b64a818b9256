"""Did an edit work, and did nothing else move: receipts of single edits."""
