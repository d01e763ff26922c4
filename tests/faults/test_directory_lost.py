"""What becomes of a run whose directory is deleted under it, or comes back without its leases."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from harness import WAIT, committed, fit, holder, kill, learning, no_gaps, saved, until

from dask_isgd.errors import RunMismatchError, RunNotFoundError
from dask_isgd.storage import Dataset, write_dataset

pytestmark = pytest.mark.cluster


def test_a_run_whose_directory_is_deleted_ends_and_says_so(client, digits, run_dir):
    run = fit(client, digits, run_dir)
    until(run, saved(run))
    shutil.rmtree(run_dir.rename(run_dir.with_name("deleted")), ignore_errors=True)  # others still write to it
    with pytest.raises(RunNotFoundError, match="deleted"):
        run.wait(timeout=WAIT)
    assert not (run_dir / "leases").exists()


def test_a_run_restored_without_its_leases_keeps_every_checkpoint_it_makes(client, digits, run_dir):
    run = fit(client, digits, run_dir, learning=learning(steps=100, checkpoint_steps=30))
    run.wait(timeout=WAIT)
    shutil.rmtree(run_dir / "leases")
    again = fit(client, digits, run_dir, resume=True, learning=learning(steps=200, checkpoint_steps=30))
    again.wait(timeout=WAIT)
    assert again.directory.leases().highest() == 2
    assert (committed(again), again.directory.checkpoints().orders()[-1]) == (200, (2, 200))
    no_gaps(again)


def test_data_that_are_rewritten_under_a_run_are_not_trained_on(client, digits, run_dir, tmp_path):
    rows = digits.load()
    for version in (0, 1):
        arrays = {digits.input_names[0]: np.roll(rows.inputs[0], version, 0).astype(np.float32), "y": rows.target}
        url = tmp_path / f"{version}.zarr"
        write_dataset(url, "train", arrays, inputs=digits.input_names[0], target="y", chunk_size=256)
        (tmp_path / f"link-{version}").symlink_to(url)
    data = (tmp_path / "link-0").rename(tmp_path / "d.zarr")
    run = fit(client, Dataset(data), run_dir)
    until(run, saved(run))
    (tmp_path / "link-1").replace(data)  # at once: scorers never see a dataset without its chunks
    kill(holder(run)["pid"])
    with pytest.raises(RunMismatchError, match=f"was changed since run {run.name} began"):
        run.wait(timeout=WAIT)
