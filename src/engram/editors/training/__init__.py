"""Editors that use gradients: fine-tuning and LoRA (a training loop) and UltraEdit (one step).

target_rows.py says what is scored, loop.py trains, matrices.py names the matrices.
"""
