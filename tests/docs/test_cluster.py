"""The batch script on the page about resuming: terminated it asks for another start, and that one finishes."""

import shutil

import pytest

from tests.docs.cluster import TINY, command, programs, requeued_until_finished
from tests.docs.pages import ROOT, blocks


@pytest.mark.multiprocess
@pytest.mark.skipif(not shutil.which("bash"), reason="it is a script for bash")
def test_requeued_until_it_is_finished(tmp_path):
    script = next(one for one in blocks(ROOT / "docs" / "resuming.md") if one.direction("file") == "train.sbatch")
    assert "#SBATCH --signal=TERM@90\n" in script.text
    (tmp_path / "train.sbatch").write_text(script.text)
    environment = programs(
        tmp_path,
        fivestep=command(f"{TINY} --max-iters 600"),
        srun='echo $$ > running; exec "$@"',
        scontrol='echo "$@" >> requeued',
    )
    requeued_until_finished(tmp_path, "train.sbatch", environment, 600)
