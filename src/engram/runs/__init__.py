"""TODO runs"""
