"""TODO layers"""
