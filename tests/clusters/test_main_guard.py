"""A script that forgets its main guard is told so in one sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest

CALL = "from dask_isgd.clusters.main_guard import require_main_guard\n"


@pytest.mark.parametrize(
    "script",
    [
        'if __name__ == "__main__":\n    require_main_guard()\n',
        'def main():\n    require_main_guard()\n\nif "__main__" == __name__:\n    main()\n',
        'import sys\nif __name__ != "__main__":\n    sys.exit()\nrequire_main_guard()\n',
        "import threading\nt = threading.Thread(target=require_main_guard)\nt.start()\nt.join()\n",
    ],
    ids=["guard", "function", "exit", "thread"],
)
def test_a_guarded_script_runs(tmp_path, script):
    (tmp_path / "script.py").write_text(CALL + script)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unguarded_one_is_refused_before_anything_starts(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import dask_isgd\n\ndask_isgd.LocalCluster(2)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"{script}, line 3: starts a cluster of processes at the top level" in done.stderr
    assert done.stderr.count("Traceback") == 1
    assert len(done.stderr.splitlines()) < 20


def test_code_without_a_script_runs():
    done = subprocess.run([sys.executable, "-c", CALL + "require_main_guard()"], capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
