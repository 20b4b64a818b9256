"""TODO editors.second_moments"""
