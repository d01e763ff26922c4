"""``python -m dask_isgd``: the command line, if the ``dask`` command is not on the path."""

from dask_isgd.pipelines.cli import isgd

if __name__ == "__main__":
    isgd(prog_name="python -m dask_isgd")
