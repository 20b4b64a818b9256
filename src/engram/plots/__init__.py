"""Pictures of arrays, labels and titles, a file for each kind. Each function returns a matplotlib
figure of its own; nothing global is touched.
"""
