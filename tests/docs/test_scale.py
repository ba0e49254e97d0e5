"""The scripts and files on the page about several machines: as far as they can be tried without a cluster."""

import configparser
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fivestep.cli import train as train_command
from tests.docs.cluster import TINY, command, programs, requeued_until_finished
from tests.docs.pages import ROOT, blocks, commands

PAGE = ROOT / "docs" / "scale.md"
SMALL = "gpt-chars --data my.txt --run-dir runs/mine --resume"
NEEDS_BASH = pytest.mark.skipif(not shutil.which("bash"), reason="they are scripts for bash")


def file(name):
    return next(block.text for block in blocks(PAGE) if block.direction("file") == name)


def torchrun_lines():
    """Every command on the page that torchrun or a cluster starts, as words."""
    from_shell = [shlex.split(line) for block in blocks(PAGE) if block.language == "sh" for line in commands(block)]
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read_string(file("fivestep.service"))
    from_service = shlex.split(unit["Service"]["ExecStart"])
    from_slurm = shlex.split(re.search(r"exec (fivestep [^']*)'", file("scale.sbatch"))[1])
    return [*from_shell, from_service, from_slurm, *(pod_command(pod) for pod in pods())]


def pods():
    yaml = pytest.importorskip("yaml", reason="the manifest is read with PyYAML")
    job = yaml.safe_load(file("pytorchjob.yaml"))
    return list(job["spec"]["pytorchReplicaSpecs"].values())


def pod_command(pod):
    container = pod["template"]["spec"]["containers"][0]
    return [*container["command"], *container["args"]]


def test_flags_exist():
    """Of fivestep, and of torchrun: each command is parsed by the one that would parse it, and nothing is started."""
    from torch.distributed.run import get_args_parser

    known = {name for parameter in train_command.params for name in parameter.opts}
    seen = 0
    for words in torchrun_lines():
        if Path(words[0]).name == "torchrun":
            options = get_args_parser().parse_args(words[1:])
            if options.training_script != "fivestep":
                assert options.training_script == "my_training.py"
                continue
            assert options.module
            words = ["fivestep", *options.training_script_args]
        assert words[:2] == ["fivestep", "train"], words
        given = {word for word in words if word.startswith("--")}
        assert given <= known, given - known
        seen += 1
    assert seen >= 7


def test_the_manifest_says_what_the_operator_reads():
    master, worker = pods()
    assert (master["replicas"], worker["replicas"]) == (1, 7)
    for pod in (master, worker):
        spec = pod["template"]["spec"]
        container = spec["containers"][0]
        assert container["name"] == "pytorch"
        command = pod_command(pod)
        patience = int(command[command.index("--shutdown-timeout") + 1])
        assert patience < spec["terminationGracePeriodSeconds"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in spec["volumes"]
        }
        assert pod["restartPolicy"] == "OnFailure"


def test_the_service_waits_for_the_save():
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string(file("fivestep.service"))
    service = unit["Service"]
    words = shlex.split(service["ExecStart"])
    assert int(words[words.index("--shutdown-timeout") + 1]) < int(service["TimeoutStopSec"])
    assert service["KillMode"] == "mixed"


@NEEDS_BASH
@pytest.mark.parametrize("name", ["scale.sbatch", "spot-notice.sh"])
def test_scripts_are_bash(name, tmp_path):
    (tmp_path / name).write_text(file(name))
    subprocess.run(["bash", "-n", name], cwd=tmp_path, check=True)


@NEEDS_BASH
@pytest.mark.multiprocess
def test_the_notice_stops_the_service(tmp_path):
    """Three looks: no answer, no notice, a notice."""
    curl = """
    case "$*" in
      *api/token*) echo >> looks; [ "$(wc -l < looks)" -gt 1 ] && echo a-token;;
      *X-aws-ec2-metadata-token:\\ a-token*) [ "$(wc -l < looks)" -gt 2 ];;
      *) exit 9;;
    esac"""
    environment = programs(tmp_path, curl=curl, sleep="exit 0", systemctl='echo "$@" >> stopped')
    (tmp_path / "spot-notice.sh").write_text(file("spot-notice.sh"))
    subprocess.run(["bash", "spot-notice.sh"], cwd=tmp_path, env=environment, check=True, timeout=300)
    assert (tmp_path / "stopped").read_text() == "stop fivestep.service\n"
    assert len((tmp_path / "looks").read_text().splitlines()) == 3


@NEEDS_BASH
@pytest.mark.multiprocess
@pytest.mark.parametrize("tasks", [1, 2])
def test_the_batch_script_is_requeued_until_the_run_is_finished(tmp_path, tasks):
    """The page's script on a cluster of stand-ins: SIGTERM to the tasks, saved, queued again, finished."""
    if tasks > 1 and importlib.util.find_spec("fivestep.processes") is None:
        pytest.skip("several processes need fivestep.processes")
    script = file("scale.sbatch")
    wanted = re.search(r"gpt2-124m --data \S+ --run-dir runs/mine --resume", script)[0]
    (tmp_path / "scale.sbatch").write_text(script.replace(wanted, f"{SMALL} {TINY} --max-iters 300"))
    srun = f"""
    for task in $(seq 0 {tasks - 1}); do
      SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS={tasks} "$@" & echo $! >> running.new
    done
    mv running.new running
    worst=0
    for task in $(jobs -p); do wait $task; code=$?; [ $code -gt $worst ] && worst=$code; done
    exit $worst"""
    scontrol = 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> requeued; fi'
    environment = programs(tmp_path, fivestep=command(), srun=srun, scontrol=scontrol)
    requeued_until_finished(tmp_path, "scale.sbatch", {**environment, "SLURM_JOB_NODELIST": "localhost"}, 300)


@pytest.mark.multiprocess
def test_torchruns_exit_codes_are_those_of_the_table(tmp_path):
    """The table on the page: 0 and 1, whatever a worker's own code is."""
    script = tmp_path / "worker.py"
    script.write_text("import sys; sys.exit(int(sys.argv[1]))")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(script)]
    done = subprocess.run([*command, "143"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert re.search(r"exitcode *: 143", done.stderr)
