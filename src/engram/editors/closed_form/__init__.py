"""TODO editors.closed_form"""
