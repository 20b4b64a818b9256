"""TODO locate.lenses"""
