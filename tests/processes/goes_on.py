"""Trainings that go on in another layout: `goes_on.py NAME STEPS TASKS`, TASKS in JSON: [[OUT, RUN, KIND], ...]."""

import json
import sys
from pathlib import Path

import fivestep as fs
from fivestep import processes
from tests.processes import jobs


def main(name, steps, tasks):
    for out, path, kind in json.loads(tasks):
        with fs.Run(path, checkpoint_every=5, say=lambda text: None) as run:
            made = jobs.trained(name, kind, int(steps), run)
        if processes.is_first():
            Path(out).write_text(json.dumps({"size": processes.size(), **made}))


if __name__ == "__main__":
    main(*sys.argv[1:])
