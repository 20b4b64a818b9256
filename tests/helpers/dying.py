"""Part of scripts whose forked writers are killed at a step: the n-th call of chosen functions."""

DYING = """
import os
calls, killed_at = 0, 0  # a fork sets them: the call at which it is killed
def dying(function):
    def call(*args, **options):
        global calls
        calls += 1
        if calls == killed_at:
            os.kill(os.getpid(), 9)
        return function(*args, **options)
    return call
def let_die(places):
    for owner, names in places.items():
        for name in names:
            setattr(owner, name, dying(getattr(owner, name)))
"""
