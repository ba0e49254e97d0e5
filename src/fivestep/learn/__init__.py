"""What shows the inside of a job, or lets its user leave: explain, doctor, eject, compare."""
