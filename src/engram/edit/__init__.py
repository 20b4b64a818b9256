"""TODO edit"""
