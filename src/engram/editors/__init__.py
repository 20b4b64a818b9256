"""TODO editors"""
