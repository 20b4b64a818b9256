"""What benchmarks report, as functions of numbers and texts. Nothing here knows a model."""
