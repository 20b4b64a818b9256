"""TODO knowledge"""
