"""Number of workers that fit on given nodes, compared with placing them one by one."""

import re
from itertools import product

from modis_dist.execution.resources import Cluster, Node

CLUSTERS = [
    (Node(4),),
    (Node(1), Node(1)),
    (Node(8, 2), Node(3)),
    (Node(5, 1), Node(2, 4), Node(0, 2)),
    (Node(7, 3),),
]


def placed(nodes: tuple[Node, ...], threads: int, gpus: float) -> int:
    """Return the number of workers that can be placed one by one; a fraction is of a single GPU."""
    cores = [node.cores for node in nodes]
    left = [[1.0] * node.gpus for node in nodes]
    count = 0
    while True:
        for index in range(len(nodes)):
            whole = [gpu for gpu, free in enumerate(left[index]) if free > 1 - 1e-9]
            shared = [gpu for gpu, free in enumerate(left[index]) if free > gpus - 1e-9]
            enough = len(whole) >= gpus if gpus >= 1 else gpus == 0 or bool(shared)
            if cores[index] >= threads and enough:
                cores[index] -= threads
                for gpu in whole[: int(gpus)]:
                    left[index][gpu] = 0.0
                if 0 < gpus < 1:
                    left[index][shared[0]] -= gpus
                count += 1
                break
        else:
            return count


def test_slots_equal_the_workers_that_can_be_placed_one_by_one() -> None:
    for nodes, threads, gpus in product(CLUSTERS, (1, 2, 3, 5), (0, 0.25, 0.4, 0.5, 1, 2)):
        assert Cluster("it", nodes).slots(threads=threads, gpus=gpus) == placed(nodes, threads, gpus)


def test_workers_get_the_maximum_number_of_threads_with_which_all_run_at_once() -> None:
    for nodes, workers, gpus in product(CLUSTERS, (1, 2, 3, 4), (0, 0.5, 1)):
        fitting = [t for t in range(1, 9) if placed(nodes, t, gpus) >= workers]
        assert Cluster("it", nodes).threads(workers=workers, gpus=gpus) == max(fitting, default=1)


def test_resources_of_a_cluster_are_listed_in_total_and_per_node() -> None:
    assert re.match(r"this machine .*\b1 GPU", Cluster("this machine", (Node(2, 1),)).has("gpus"))
    assert re.findall(r"\d+", Cluster("it", (Node(2), Node(4))).has("cores")) == ["6", "2", "4"]
