"""What `dask isgd train` does before and after training, without a clock: what is imported when, what overlaps."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading

import pytest

import dask_isgd as isgd
from dask_isgd.clusters import local
from dask_isgd.pipelines.commands.train import _meanwhile
from dask_isgd.runtime.imports import THREAD, uncollected

WAIT = 60
SLOW = "torch bokeh matplotlib xarray pandas scipy"

STARTING = """
import sys
from dask_isgd.errors import IsgdError
import dask_isgd.clusters as clusters
import distributed.deploy.spec as spec

def stop(self, *args, **kwargs):
    raise IsgdError("imported: " + " ".join(sorted(set(sys.argv[1].split()) & set(sys.modules))))

spec.SpecCluster.__init__ = stop
from click.testing import CliRunner
from dask_isgd.pipelines.cli import isgd
print(CliRunner().invoke(isgd, sys.argv[2:]).output)
"""


def output_of(code: str, *arguments: str, cwd: object) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=True, cwd=str(cwd)).stdout


def test_a_cluster_is_started_before_anything_slow_is_imported(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output_of(STARTING, SLOW, "prepare", "digits", cwd=tmp_path)
    assert output_of(STARTING, SLOW, "train", "digits", cwd=tmp_path).split() == ["Error:", "imported:"]


def test_help_imports_nothing_slow(tmp_path):
    code = (
        "import sys; from click.testing import CliRunner; from dask_isgd.pipelines.cli import isgd\n"
        "assert CliRunner().invoke(isgd, ['train', '--help']).exit_code == 0\n"
        "print(*sorted(set(sys.argv[1].split()) & set(sys.modules)))"
    )
    assert output_of(code, f"{SLOW} zarr distributed", cwd=tmp_path).split() == []


@pytest.mark.parametrize("driver", [True, False])
def test_only_a_machine_with_a_driver_needs_torch_to_count_its_gpus(monkeypatch, driver):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(local, "_has_driver", lambda: driver)
    monkeypatch.setitem(sys.modules, "torch", None)
    if driver:
        with pytest.raises(ImportError):
            local.visible_gpus()
    else:
        assert local.visible_gpus() == []


def _imported() -> tuple[bool, bool, bool]:
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(WAIT)
    return "torch" in sys.modules, "torch._dynamo" in sys.modules, gc.get_freeze_count() > 0


def _read_slowly() -> None:
    """Leave a thread behind that the interpreter waits for, such as one that reads from a store that does not reply."""
    threading.Thread(target=threading.Event().wait, args=(WAIT,)).start()


@pytest.mark.cluster
def test_workers_import_what_their_role_needs_before_any_task_does(caplog):
    """And they close although they may still import or read, before their nannies lose patience and kill them."""
    with caplog.at_level(logging.WARNING, logger="distributed.nanny"):
        with isgd.LocalCluster(2) as cluster, cluster.get_client() as client:
            workers = client.scheduler_info(n_workers=-1)["workers"]
            found = {workers[address]["name"]: had for address, had in client.run(_imported).items()}
            client.run(_read_slowly)
        with isgd.LocalCluster(2):
            pass
    assert found == {"learner": (True, True, True), "scorer-0": (True, False, True)}
    assert [record.getMessage() for record in caplog.records if "still alive" in record.getMessage()] == []


def test_imports_leave_the_garbage_collector_as_it_was():
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with uncollected():
                assert not gc.isenabled()
            assert gc.isenabled() is enabled
        finally:
            gc.enable()


def test_the_plot_is_drawn_while_the_cluster_closes():
    closed, drawing = threading.Event(), threading.Event()

    def draw() -> str:
        drawing.set()
        assert closed.wait(WAIT)
        return "summary.png"

    with _meanwhile(draw) as plot:
        assert drawing.wait(WAIT)
        closed.set()
    assert plot.result() == "summary.png"


def test_an_error_of_either_is_raised():
    with pytest.raises(OSError, match="full"), _meanwhile(lambda: (_ for _ in ()).throw(OSError("full"))):
        pass
    with pytest.raises(KeyError), _meanwhile(lambda: (_ for _ in ()).throw(OSError("full"))):
        raise KeyError
