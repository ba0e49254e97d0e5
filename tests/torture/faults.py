"""placeholder"""


def plant(run, **fault):
    pass
