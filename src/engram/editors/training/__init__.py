"""TODO editors.training"""
