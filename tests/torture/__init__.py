"""Trainings that are killed, torn, failed, cut from power and signalled, and must end bit for bit all the same.

python -m pytest tests/torture               the short forms, as in the whole suite
make torture                                 the full ones: about an hour and a half on two cores
"""
