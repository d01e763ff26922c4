"""Two clusters of one process are two."""

import pytest

import dask_isgd as isgd

pytestmark = pytest.mark.cluster


def test_each_cluster_hands_out_a_client_of_its_own():
    with isgd.LocalCluster(1) as first, first.get_client() as one, isgd.LocalCluster(1) as second:
        two = second.get_client()
        assert one.scheduler.address == first.scheduler_address != second.scheduler_address
        assert two.scheduler.address == second.scheduler_address
        two.close()
