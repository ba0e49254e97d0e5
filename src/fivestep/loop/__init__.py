"""The loop: five steps, the generator around them, and what they need. Read `train.py`, `step.py`, `objective.py`."""
