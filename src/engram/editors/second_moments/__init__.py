"""Second moments of keys, C = mean of k k^T over ordinary text: what closed-form edits leave alone.

corpora.py yields text, corpus_pass.py sums over it, measure.py caches the results, matrix.py is the
value: solves, eigenvectors, its null space.
"""
