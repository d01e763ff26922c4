"""Fault 12 as a script sees it: a disk that is full ends it with one sentence, and with its own traceback only."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cluster

SCRIPT = """
import resource, sys
import dask_isgd as isgd

def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

if __name__ == "__main__":
    learning = isgd.Learning(steps=10**6, batch_size=32, checkpoint_steps=50, publish_every=20, report_every=10)
    data = isgd.Dataset(sys.argv[1])
    with isgd.LocalCluster(2) as cluster, cluster.get_client() as client:
        run = isgd.fit(client, "dask_isgd.pipelines.models:digits", data, sys.argv[2], learning=learning)
        for latest in run.watch(60):
            if latest.get("checkpoint"):
                break
        client.run(limit)
        run.wait(timeout=60)
"""


def test_a_script_on_a_full_disk(digits, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, script, digits.url, tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
    assert done.returncode == 1
    *_, last = lines = done.stderr.strip().splitlines()
    said = f"dask_isgd.errors.StorageFullError: cannot write {tmp_path}/run/"
    assert last.startswith(said), done.stderr
    assert "the file size limit is reached" in last
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert len(lines) < 25, done.stderr
