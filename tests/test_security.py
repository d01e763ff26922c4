"""What an attacker or an accident could slip in: names, paths, pickles, HTML, certificates; and what must stay in."""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import gzip
import hashlib
import http.server
import io
import ipaddress
import json
import pickle
import re
import ssl
import threading
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import distributed
import fsspec
import numpy as np
import pytest
from conftest import MODEL
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from distributed.security import Security
from packaging.version import Version
from scipy.io import savemat

import dask_isgd as isgd
from dask_isgd.checks.request import RunRequest, create, prepare
from dask_isgd.display.html import card
from dask_isgd.errors import CheckpointError, DataError, RunNotFoundError
from dask_isgd.pipelines.datasets import svhn
from dask_isgd.pipelines.datasets.idx import read_idx
from dask_isgd.pipelines.datasets.sources import Source
from dask_isgd.pipelines.ingestion.tables.opening import open_table
from dask_isgd.storage import Checkpoints, Dataset, RunDirectory, write_dataset
from dask_isgd.storage.run.checkpoints import MANIFEST, TENSORS, _digest

SOURCES = Path(isgd.__file__).parent
SECRET = "hunter2-SECRET"


class TestNames:
    @pytest.mark.parametrize("name", ["../../etc", "a/b", "<script>alert(1)</script>", "a" * 65, "", "ü", "a\n", 7])
    def test_a_run_name_that_is_none_is_refused(self, tmp_path, name):
        directory = RunDirectory(tmp_path / "run")
        directory.create({"run": name})
        with pytest.raises(RunNotFoundError, match="got run name"):
            directory.document()

    def test_names_of_ours_pass(self, tmp_path):
        RunDirectory(tmp_path / "run").create({"run": "Run_1.2-x"})
        assert RunDirectory(tmp_path / "run").document()["run"] == "Run_1.2-x"

    def test_html_is_shown_as_text(self):

        page = card("<script>alert(1)</script>", "<b>", {"step": 1, "fault": "<img src=x>"})
        assert "<script>" not in page
        assert "<b><" not in page.replace("<b>&lt;", "")
        assert "<img" not in page


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path(self.path),))  # type: ignore[attr-defined]


class TestCheckpoints:
    def forged(self, folder: Path, packed: bytes, **changes) -> Checkpoints:
        checkpoints = Checkpoints(folder / "checkpoints")
        checkpoints.commit(1, 1, {"a": np.ones(2)}, {})
        place = folder / "checkpoints" / "step-000000001-i0001"
        manifest = json.loads((place / MANIFEST).read_text())
        manifest["files"] = {TENSORS: {"sha256": hashlib.sha256(packed).hexdigest(), "bytes": len(packed)}}
        manifest.update(changes)
        manifest["sha256"] = _digest(manifest)
        (place / MANIFEST).write_text(json.dumps(manifest))
        (place / TENSORS).write_bytes(packed)
        return checkpoints

    def test_a_pickle_is_no_checkpoint_and_is_not_run(self, tmp_path):
        exploit = Exploit()
        exploit.path = str(tmp_path / "ran")
        checkpoints = self.forged(tmp_path, pickle.dumps(exploit))
        with pytest.raises(CheckpointError, match="malformed"):
            checkpoints.load("step-000000001-i0001")
        with pytest.raises(CheckpointError, match="malformed"):
            checkpoints.latest()
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret"])
    def test_a_manifest_leads_nowhere_else(self, tmp_path, name):
        (tmp_path / "secret").write_bytes(b"x")
        checkpoints = self.forged(
            tmp_path, b"x", files={name: {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}}
        )
        with pytest.raises(CheckpointError, match=r"wanted tensors\.safetensors alone"):
            checkpoints.load("step-000000001-i0001")

    def test_a_header_that_promises_more_than_there_is_costs_nothing(self, tmp_path):
        header = json.dumps({"a": {"dtype": "F64", "shape": [10**12], "data_offsets": [0, 8 * 10**12]}}).encode()
        checkpoints = self.forged(tmp_path, len(header).to_bytes(8, "little") + header + b"\0" * 64)
        with pytest.raises(CheckpointError, match="malformed"):
            checkpoints.load("step-000000001-i0001")


class TestBombs:
    """Small files that would become large: no more is unpacked than was promised, no promise beyond reason is taken."""

    HUGE = 50_000_000

    @contextlib.contextmanager
    def refused(self, says: str):
        """With an error that says so, and in little memory."""
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match=says):
                yield
            assert tracemalloc.get_traced_memory()[1] < self.HUGE / 5
        finally:
            tracemalloc.stop()

    def test_a_gzipped_file_longer_than_its_header_says(self, tmp_path):
        (tmp_path / "labels.gz").write_bytes(
            gzip.compress(b"\0\0\x08\x01" + (10).to_bytes(4, "big") + bytes(self.HUGE))
        )
        with self.refused("got more than 18 bytes, wanted 18"):
            read_idx(tmp_path / "labels.gz")

    def test_a_gzipped_file_whose_header_says_too_much(self, tmp_path):
        shape = b"".join(n.to_bytes(4, "big") for n in (60_000, 28_000, 28_000))
        (tmp_path / "images.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + shape + bytes(self.HUGE)))
        with self.refused(r"promises 47,040,000,000,000 bytes .*wanted at most 1,073,741,824"):
            read_idx(tmp_path / "images.gz")

    @pytest.mark.parametrize("array", ["X", "y"])
    def test_a_matlab_file(self, tmp_path, array):
        content = {"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.ones((4, 1), np.uint8)}
        huge = np.broadcast_to(np.uint8(1), (self.HUGE // 2, 2))
        for split in ("train", "extra", "test"):
            savemat(tmp_path / f"{split}_32x32.mat", {**content, array: huge}, do_compression=True)
            assert (tmp_path / f"{split}_32x32.mat").stat().st_size < self.HUGE / 100
        with self.refused(rf"got {array} uint8\(25000000, 2\), wanted"):
            svhn.prepare(str(tmp_path / "s.zarr"), source=str(tmp_path))

    def zipped(self, path: Path, size: int, *, says: int | None = None, compression: int = zipfile.ZIP_DEFLATED) -> str:
        """An .npz file with one array of zeros, which says that it unpacks to ``says`` bytes."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
        with zipfile.ZipFile(path, "w", compression) as archive:
            with archive.open("x.npy", "w") as file:
                file.write(header.getvalue())
                for _ in range(min(size, self.HUGE) // 1_000_000):
                    file.write(bytes(1_000_000))
            if says is not None:
                archive.filelist[0].file_size = says
        return str(path)

    def test_a_zip_that_says_it_is_larger_than_memory(self, tmp_path):
        archive = self.zipped(tmp_path / "a.npz", 1 << 50, says=(1 << 50) + 128)
        with self.refused(r"got arrays of 1\.00 PiB and .* of free memory, wanted them to fit; unpack"):
            open_table({"numpy": archive})

    def test_a_zip_that_says_it_is_small(self, tmp_path):
        archive = self.zipped(tmp_path / "a.npz", self.HUGE, says=1000)
        with self.refused(r"cannot be read by numpy \(Bad CRC"):
            open_table({"numpy": archive})

    def test_an_array_in_a_zip_that_promises_more_than_there_is(self, tmp_path):
        archive = self.zipped(tmp_path / "a.npz", 1 << 50)
        with self.refused(r"got 50,000,128 bytes for x\.npy, wanted 1,125,899,906,842,752 for uint8"):
            open_table({"numpy": archive})

    def test_a_zip_in_a_compression_that_numpy_never_writes(self, tmp_path):
        archive = self.zipped(tmp_path / "a.npz", 1_000_000, compression=zipfile.ZIP_BZIP2)
        with self.refused(r"x\.npy in a compression that numpy never writes"):
            open_table({"numpy": archive})

    def test_a_zip_that_holds_a_pickle(self, tmp_path):
        exploit = Exploit()
        exploit.path = str(tmp_path / "ran")
        np.savez(tmp_path / "a.npz", x=np.array([exploit]), allow_pickle=True)
        with self.refused("allow_pickle=False"):
            open_table({"numpy": str(tmp_path / "a.npz")})
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip file after all", b"\x93NUMPY"])
    def test_a_zip_that_is_none(self, tmp_path, content):
        (tmp_path / "a.npz").write_bytes(content)
        with self.refused(r"a\.npz: cannot be read by numpy"):
            open_table({"numpy": str(tmp_path / "a.npz")})

    def test_an_image_of_a_million_times_its_size(self, tmp_path):
        size = (20_000).to_bytes(4, "big") * 2
        chunks = [b"IHDR" + size + b"\x08\x00\x00\x00\x00", b"IDAT" + zlib.compress(bytes(self.HUGE)), b"IEND"]
        framed = [len(c[4:]).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in chunks]
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))
        with self.refused(r"a\.png: cannot be read as an image .*400000000 pixels"):
            open_table({"images": str(tmp_path)})


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """An https server of this machine, whose certificate is trusted: its folder and its URL."""
    folder = tmp_path_factory.mktemp("site")
    authority = Authority(folder / "ca", "site")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{plain.server_port}/digits")
                self.end_headers()
            else:
                super().do_GET()

        def copyfile(self, source, outputfile) -> None:
            with contextlib.suppress(ConnectionError):  # they hang up on what is too large
                super().copyfile(source, outputfile)

        def log_message(self, *_: object) -> None:
            return None

    handler = functools.partial(Handler, directory=str(folder))
    server, plain = (http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.security().tls_scheduler_cert)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    (folder / "digits").write_bytes(b"x" * 5_000_000)
    for each in (server, plain):
        threading.Thread(target=each.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(authority.file))
        yield folder, f"https://127.0.0.1:{server.server_port}"
    for each in (server, plain):
        each.shutdown()
        each.server_close()


class TestDownloads:
    @pytest.mark.parametrize(
        ("path", "changes", "says"),
        [
            ("digits", {}, None),
            ("digits", {"limit": 4_000_000}, "more than 4,000,000 bytes"),
            ("digits", {"sha": "0" * 64}, "hash"),
            ("moved", {}, "redirected to http://127.*wanted https"),
        ],
        ids=["right", "too large", "another hash", "no https"],
    )
    def test_https_to_the_end_no_larger_than_promised_and_the_hash_that_was_published(
        self, site, tmp_path, monkeypatch, path, changes, says
    ):
        folder, url = site
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        right = hashlib.sha256((folder / "digits").read_bytes()).hexdigest()
        source = Source(
            name="test", files={path: changes.pop("sha", right)}, base_url=url, variable="ISGD_TEST",
            **{"limit": 10_000_000, **changes},
        )  # fmt: skip
        if says is None:
            assert source.find()[path].read_bytes() == (folder / "digits").read_bytes()
            return
        with pytest.raises(DataError, match=rf"cannot download {url}/{path} .*{says}"):
            source.find()
        assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size]

    def test_a_certificate_that_nobody_signed_is_refused(self, site, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.delenv("SSL_CERT_FILE")
        source = Source(name="test", files={"digits": "0" * 64}, base_url=site[1], variable="ISGD_TEST", limit=10**9)
        with pytest.raises(DataError, match="CERTIFICATE_VERIFY_FAILED"):
            source.find()


def test_a_cluster_of_ours_listens_on_the_loopback_address_only(client):
    def listening() -> set[str]:
        import psutil

        return {c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}

    places = [listening(), *client.run(listening).values()]
    assert client.dashboard_link.startswith("http://127.0.0.1:")
    assert all(places)
    assert set().union(*places) == {"127.0.0.1"}


@pytest.mark.parametrize(
    "pattern",
    [
        r"\bpickle\.loads?\(",
        r"\btorch\.load\((?!\w+, weights_only=True\))",
        r"\byaml\.(load|full_load|unsafe_load)\(",
        r"(?<![\w.])(eval|exec)\(",
    ],
)
def test_nothing_that_runs_code_out_of_data(pattern):
    files = [path for path in SOURCES.rglob("*.py") if re.search(pattern, path.read_text())]
    assert files == []


def test_no_secret_gets_out(tmp_path):
    x, y = np.ones((20, 4), "f4"), np.arange(20) % 2
    place = f"memory://{tmp_path.name}/data.zarr"
    options = {"token": SECRET}
    write_dataset(place, "train", {"x": x, "y": y}, inputs=["x"], target="y", chunk_size=10)
    data = Dataset(place, group="train", storage_options=options)
    plan = prepare(RunRequest(model=small, data=data, run_dir=tmp_path / "run", learning=isgd.Learning(steps=1)))
    create(plan)
    shown = [repr(plan), repr(plan.spec), json.dumps(plan.document), repr(data), str(plan.spec.directory)]
    shown += [path.read_text("latin-1") for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(SECRET in text for text in shown)
    for bad in (f"http://user:{SECRET}@localhost:1/x.zarr", f"http://localhost:1/x.zarr?sig={SECRET}"):
        with pytest.raises((OSError, ValueError)) as caught:
            Dataset(bad)._layout  # noqa: B018
        assert SECRET not in str(caught.value)


@pytest.fixture
def signed(tmp_path):
    """A dataset in a zip behind a presigned URL, and what makes its server refuse from then on."""
    write_dataset(tmp_path / "d.zarr", "train", {"x": np.ones((20, 4), "f4"), "y": np.arange(20) % 2},
                  inputs=["x"], target="y", chunk_size=10)  # fmt: skip
    content, refused = io.BytesIO(), threading.Event()
    with zipfile.ZipFile(content, "w") as archive:
        for path in sorted((tmp_path / "d.zarr").rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "d.zarr").as_posix())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            whole = content.getvalue()
            first, last = map(int, self.headers.get("Range", f"bytes=0-{len(whole) - 1}")[6:].split("-"))
            part = b"" if refused.is_set() else whole[first : last + 1]
            self.send_response(500 if refused.is_set() else 206)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(part)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            return None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"zip::http://127.0.0.1:{server.server_port}/d.zip?X-Amz-Signature={SECRET}", refused.set
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(
    Version(fsspec.__version__) < Version("2026.9"), reason="older ones find no group in a zip behind HTTP"
)
def test_no_error_holds_the_signature_of_a_url(signed):
    url, refuse = signed
    data = Dataset(url)
    assert len(data) == 20
    refuse()
    for read in (lambda: copy.copy(data).read(0, 20), lambda: Dataset(url)):
        with pytest.raises((OSError, DataError)) as caught:
            read()
        assert SECRET not in str(caught.value)


def small():
    import torch

    return torch.nn.Linear(4, 2)


class Authority:
    """Signs certificates for this machine."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.name = folder, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.file = folder / f"{name}.pem"
        self._write(self.file, self._sign(self.name, self.key, authority=True))

    def _sign(self, subject: x509.Name, key, *, authority: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        local = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(local, critical=False)
        )
        return builder.sign(self.key, hashes.SHA256())

    @staticmethod
    def _write(path: Path, *parts) -> None:
        form, clear = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        pem = serialization.Encoding.PEM
        path.write_bytes(
            b"".join(
                p.public_bytes(pem) if isinstance(p, x509.Certificate) else p.private_bytes(pem, form, clear)
                for p in parts
            )
        )

    def security(self, trusted: Path | None = None) -> Security:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dask")])
        pair = self.folder / f"pair-{x509.random_serial_number()}.pem"
        self._write(pair, key, self._sign(subject, key, authority=False))
        own = {
            f"tls_{role}_{part}": str(pair) for role in ("client", "scheduler", "worker") for part in ("cert", "key")
        }
        return Security(require_encryption=True, tls_ca_file=str(trusted or self.file), **own)


def test_with_tls_the_right_certificate_trains_and_a_wrong_one_is_refused(digits, tmp_path):
    ours, theirs = Authority(tmp_path / "ca", "ours"), Authority(tmp_path / "ca", "theirs")
    security = ours.security()
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=2,
        processes=False,
        protocol="tls://",
        host="127.0.0.1",
        security=security,
        dashboard_address="127.0.0.1:0",
    ) as cluster:
        assert cluster.scheduler_address.startswith("tls://")
        with pytest.raises(OSError, match=r"(?s)."):
            distributed.Client(cluster.scheduler_address, security=theirs.security(ours.file), timeout=5)
        with distributed.Client(cluster.scheduler_address, security=security) as client:
            learning = isgd.Learning(steps=60, batch_size=32, threads=1)
            run = isgd.fit(client, MODEL, digits, tmp_path / "run", learning=learning)
            assert run.wait(timeout=120)["steps"] == 60
