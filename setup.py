"""The packages, of which two lie at the top of the repository; their links inside dask_isgd/ are in no archive."""

from setuptools import find_packages, setup

ELSEWHERE = ("storage", "pipelines")
inside = find_packages(include=["dask_isgd", "dask_isgd.*"], exclude=[f"dask_isgd.{name}*" for name in ELSEWHERE])
beside = find_packages(include=[pattern for name in ELSEWHERE for pattern in (name, f"{name}.*")])
setup(packages=[*inside, *(f"dask_isgd.{name}" for name in beside)])
