"""Object stores of the clouds, opened through obstore: S3 and what speaks its protocol, Google's and Azure's."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dask_isgd import config
from dask_isgd.errors import ConfigError
from dask_isgd.extras import needs

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_EXTRA = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "azure", "abfs", "abfss", "adl"), "azure"),
}
# Options of fsspec's S3 client that have another name in obstore; data sources of other libraries still take those.
_S3_NAMES = {
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "endpoint_url": "endpoint",
    "anon": "skip_signature",
}
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_CLIENT = ("client_options", "retry_config")
_LONGEST = 400
_ENVIRONMENT = ("AWS_", "GOOGLE_", "AZURE_")
_MOST_OPEN = 64
_opened: dict[tuple[str, str, str, float], ObjectStore] = {}
_lock = threading.Lock()
_MAX_RETRIES = 100  # the time limits them


def in_cloud(url: str) -> bool:
    """Return whether ``url`` lies in an object store that this module opens."""
    return "::" not in url and urlsplit(url).scheme in _EXTRA


def open_cloud(url: str, options: Mapping[str, Any]) -> ObjectStore:
    """Open the folder that ``url`` denotes in a bucket; nothing is requested yet.

    ``options`` are obstore's: settings of the store by name (``region``, ``endpoint``, ``access_key_id``, …),
    ``client_options`` and ``retry_config``; ``profile`` names one of boto's. fsspec's names ``key``, ``secret``,
    ``token``, ``endpoint_url`` and ``anon`` are understood as well. Without credentials among them they are looked
    for where the cloud's own tools look. After ``isgd.storage.timeout`` a request that found the store busy or
    unreachable is no longer retried. The same arguments return the same store, and with it its connections and
    credentials. Raises ConfigError, which shows no option's value.
    """
    environment = sorted((k, v) for k, v in os.environ.items() if k.startswith(_ENVIRONMENT))
    key = (url, repr(sorted(options.items())), repr(environment), config.seconds("storage.timeout"))
    with _lock:
        if key not in _opened:
            _opened[key] = _open(url, options)
            while len(_opened) > _MOST_OPEN:
                del _opened[next(iter(_opened))]  # the oldest; who uses it keeps it
        return _opened[key]


def _open(url: str, options: Mapping[str, Any]) -> ObjectStore:
    scheme = urlsplit(url).scheme
    with needs(_EXTRA[scheme], url):
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    given = {k: v for k, v in options.items() if k not in (*_CLIENT, "profile")}
    extra: dict[str, Any] = {}
    if _EXTRA[scheme] == "s3":
        given = {_S3_NAMES.get(name, name): value for name, value in given.items()}
        provider = None if _has_credentials(given) else _boto(url, options.get("profile"), given)
        extra = {} if provider is None else {"credential_provider": provider}
    limit = timedelta(seconds=config.seconds("storage.timeout"))
    client = {"timeout": limit, "connect_timeout": limit, "allow_http": _plain_http(given)}
    client |= options.get("client_options", {})
    retry = {"max_retries": _MAX_RETRIES, "retry_timeout": limit, **options.get("retry_config", {})}
    try:
        return from_url(_known(url), config=given or None, client_options=client, retry_config=retry, **extra)  # type: ignore[call-overload, no-any-return]
    except (BaseError, TypeError, ValueError) as error:
        why = reason(error) if isinstance(error, BaseError) else "wanted texts as values"  # others may show a secret
        raise ConfigError(f"{url} cannot be opened: {why}. Check the URL, and storage_options: obstore's") from None


def reason(error: Exception) -> str:
    """Return an error of obstore as one line, without what follows it: the same with the internals of its client."""
    return " ".join(str(error).partition("\n\nDebug source:")[0].split())[:_LONGEST] or type(error).__name__


def _known(url: str) -> str:
    return url.replace("gcs://", "gs://", 1) if url.startswith("gcs://") else url


def _plain_http(given: Mapping[str, Any]) -> bool:
    """Return whether the endpoint, given or in the environment, is one without TLS: whoever names it means it."""
    named = given.get("endpoint") or next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
    return str(named).startswith("http://")


def _has_credentials(given: Mapping[str, Any]) -> bool:
    return bool(given.get("access_key_id") or given.get("aws_access_key_id") or given.get("skip_signature"))


def _boto(url: str, profile: str | None, given: Mapping[str, Any]) -> Any:
    """Return the credentials that boto finds (environment, profile, single sign-on, role); None if it finds none."""
    with needs("s3", url):
        import boto3
        import botocore.exceptions
        from obstore.auth.boto3 import Boto3CredentialProvider
    try:
        session = boto3.Session(profile_name=profile, region_name=given.get("region"))
        return Boto3CredentialProvider(session) if session.get_credentials() is not None else None
    except botocore.exceptions.BotoCoreError as error:
        raise ConfigError(
            f"{url} cannot be opened: {error}. Check profile= in storage_options and boto's files"
        ) from error
