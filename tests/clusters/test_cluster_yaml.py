"""``cluster.yaml``: every mistake at once, every example works, TLS from end to end."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import dask
import distributed
import pytest
from distributed import Client, LocalCluster

from dask_isgd.clusters.cluster_file import cluster_from_mapping, load_cluster
from dask_isgd.clusters.open import open_cluster, queue_options
from dask_isgd.errors import ConfigError, MissingExtraError, WaitTimeoutError

EXAMPLES = Path(__file__).parents[2] / "examples" / "clusters"


def test_every_mistake_at_once():
    with pytest.raises(ConfigError) as caught:
        cluster_from_mapping(
            {
                "cluster": "slurm",
                "scorrers": 3,
                "learners": 0,
                "job": {"cores": "many", "walltime": 14400, "memmory": "4GB"},
                "learner": {"processes": 2, "job-extra-directives": "--gres=gpu:1"},
                "scheduler": {"dashboard": ":8787", "port": "x"},
                "security": "temporary",
                "wait": "long",
            }
        )
    assert str(caught.value).splitlines() == [
        "job.cores: got 'many', wanted a whole number at least 1",
        "job.walltime: got 14400, wanted a string in quotes such as '04:00:00'",
        "job: unknown key 'memmory'; did you mean 'memory'?",
        "learner.job-extra-directives: got '--gres=gpu:1', wanted a list of strings",
        "learner.memory: got nothing, wanted it here or under job",
        "learner.processes: a learner is one process; for several runs at a time write learners: 2",
        "learners: got 0, wanted a whole number at least 1",
        "scheduler.port: got 'x', wanted a whole number at least 0",
        "scheduler: unknown key 'dashboard'; did you mean 'dashboard-address'?",
        "scorer.memory: got nothing, wanted it here or under job",
        "shared-directory: wanted with security: temporary; the jobs read their keys there",
        "unknown key 'scorrers'; did you mean 'scorers'?",
        "wait: got 'long', wanted a duration such as '10 minutes'",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "cluster: got None, wanted one of local, scheduler"),
        ([1], "got list, wanted a mapping"),
        ({"cluster": "slrum"}, "did you mean 'slurm'"),
        ({"cluster": "local", "job": {}}, "unknown key 'job'; known: "),
        ({"cluster": "local", "gpus": 2}, "a list of GPUs"),
        ({"cluster": "local", "scorers": {"minimum": 3, "maximum": 2}}, "scorers: got"),
        ({"cluster": "scheduler"}, "address: wanted this"),
        ({"cluster": "scheduler", "address": "a", "scheduler-file": "b"}, "not both"),
        ({"cluster": "scheduler", "address": "a", "security": "temporary"}, "those that the running scheduler uses"),
        ({"cluster": "scheduler", "address": "a", "security": {"cert": "c"}}, "ca-file, cert and key"),
        ({"cluster": "htcondor", "job": {"cores": 1, "memory": "1GB"}}, "scorer.disk: got nothing"),
        ({"cluster": "local", "dask": [1]}, "dask: got"),
    ],
)
def test_what_is_refused(content, message):
    with pytest.raises(ConfigError, match=message):
        cluster_from_mapping(content)


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("cluster: lokal", "did you mean 'local'")])
def test_the_file_is_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_cluster(tmp_path / "c.yaml")
    assert "c.yaml" in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_cluster(tmp_path / "missing.yaml")


def test_every_example_is_valid():
    kinds = {path.stem: load_cluster(path).kind for path in EXAMPLES.glob("*.yaml")}
    assert kinds == {"local": "local", "slurm": "slurm", "scheduler": "scheduler", "dask-cuda": "dask-cuda"}


def test_a_queues_jobs():
    options = queue_options(load_cluster(EXAMPLES / "slurm.yaml"))
    learner = options.pop("learner")
    assert (options["queue"], learner["queue"]) == ("scorer", "learner")
    assert options["worker_extra_args"] == ["--lifetime", "13800s", "--lifetime-stagger", "300s"]
    assert learner["worker_extra_args"] == ["--lifetime", "14100s"]
    assert learner["job_extra_directives"] == ["--gres=gpu:1", "--signal=B:TERM@60"]
    assert "job_extra_directives" not in options
    assert (options["n_workers"], options["learners"]) == (1, 1)


def test_dasks_configuration_reaches_the_jobs():
    config = cluster_from_mapping(
        {"cluster": "slurm", "job": {"cores": 1, "memory": "1GB"}, "dask": {"isgd.cluster.timeout": "7s"}}
    )
    (line,) = queue_options(config)["job_script_prologue"]
    done = subprocess.run(
        [
            "sh",
            "-c",
            f"{line}; exec {sys.executable} -c 'import dask; print(dask.config.get(\"isgd.cluster.timeout\"))'",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "7s"


def test_this_machine():
    with open_cluster(load_cluster(EXAMPLES / "local.yaml")) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        assert sorted(w["name"] for w in workers) == ["learner", "scorer-0"]
        assert dask.config.get("distributed.comm.timeouts.connect") == "60s"


def test_an_existing_scheduler(tmp_path):
    with LocalCluster(1, processes=False, dashboard_address="127.0.0.1:0", scheduler_port=0) as cluster:
        text = (EXAMPLES / "scheduler.yaml").read_text()
        (tmp_path / "c.yaml").write_text(text.replace("tcp://127.0.0.1:8786", cluster.scheduler_address))
        with open_cluster(load_cluster(tmp_path / "c.yaml")) as client:
            assert dask.config.get("isgd.cluster.timeout") == 300
            assert client.submit(lambda: 6 * 7).result(timeout=30) == 42
        assert cluster.status.name == "running", "what was not started here is not closed"


def test_no_scheduler_there():
    config = cluster_from_mapping(
        {"cluster": "scheduler", "address": "tcp://127.0.0.1:9", "dask": {"distributed.comm.timeouts.connect": "0.5s"}}
    )
    with (
        pytest.raises(WaitTimeoutError, match=r"no reply from a Dask scheduler at 'tcp://127.0.0.1:9'"),
        open_cluster(config),
    ):
        pass


def test_dask_cuda_is_asked_for_one_process_a_gpu(monkeypatch):
    """Without a GPU: the call and no more. dask-cuda's class is Dask's own LocalCluster with devices shared out."""
    asked = {}

    def made(security=None, **options):
        asked.update(options)
        return LocalCluster(1, processes=False, dashboard_address="127.0.0.1:0")

    monkeypatch.setitem(sys.modules, "dask_cuda", types.SimpleNamespace(LocalCUDACluster=made))
    with open_cluster(load_cluster(EXAMPLES / "dask-cuda.yaml")) as client:
        assert isinstance(client, Client)
    assert asked == {
        "threads_per_worker": 1,
        "device_memory_limit": 0.8,
        "dashboard_address": "127.0.0.1:8787",
        "host": "127.0.0.1",
    }


def test_dask_cuda_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    with (
        pytest.raises(MissingExtraError, match=r"pip install 'dask_isgd\[cuda\]'"),
        open_cluster(load_cluster(EXAMPLES / "dask-cuda.yaml")),
    ):
        pass


def test_tls_with_keys_of_the_clusters_own():
    with open_cluster(cluster_from_mapping({"cluster": "local", "scorers": 1, "security": "temporary"})) as client:
        addresses = [client.scheduler.address, *client.scheduler_info(n_workers=-1)["workers"]]
        assert len(addresses) == 3
        assert all(address.startswith("tls://") for address in addresses)
        stranger = cluster_from_mapping({"cluster": "scheduler", "address": client.scheduler.address})
        with pytest.raises(ConfigError, match="security: wanted the scheduler's"), open_cluster(stranger):
            pass


def test_tls_with_keys_from_files(tmp_path):
    temporary = distributed.Security.temporary()
    paths = {"ca-file": "tls_ca_file", "cert": "tls_scheduler_cert", "key": "tls_scheduler_key"}
    security = {}
    for name, attribute in paths.items():
        path = tmp_path / f"{name}.pem"
        path.write_text(getattr(temporary, attribute))
        security[name] = str(path)
    with open_cluster(cluster_from_mapping({"cluster": "local", "scorers": 1, "security": security})) as first:
        other = {"cluster": "scheduler", "address": first.scheduler.address, "security": security}
        with open_cluster(cluster_from_mapping(other)) as second:
            assert second.submit(lambda: 1).result(timeout=30) == 1
