"""`--clients` and `--partition`: how many virtual clients each data set gets, their names, and the mistakes."""

import pytest
from test_faces_partition import pack_of
from tiny_federation import site_settings

from common.errors import UserError
from simulation.commands import Engine, federate_here
from simulation.engine.cluster import resources_of_actor
from simulation.engine.virtual import VirtualSites, divide, parse_partition


@pytest.mark.parametrize(("text", "alpha"), [("identity", None), ("dirichlet:0.5", 0.5), ("dirichlet:1e3", 1000.0)])
def test_a_partition(text, alpha):
    assert parse_partition(text) == alpha


@pytest.mark.parametrize("text", ["", "random", "dirichlet", "dirichlet:", "dirichlet:x", "dirichlet:0",
                                  "dirichlet:nan", "dirichlet:-1", "identity:2", "Dirichlet:1"])  # fmt: skip
def test_a_partition_says_how_it_is_written(text):
    with pytest.raises(UserError, match=r"write identity or dirichlet:ALPHA"):
        parse_partition(text)


def test_data_sets_get_clients_in_proportion_to_what_they_hold():
    packs = {"large": pack_of(num_training=60), "small": pack_of(num_training=20)}  # at most 30 and 10 clients
    assert divide(packs, 2, None) == {"large": 1, "small": 1}
    assert divide(packs, 20, None) == {"large": 15, "small": 5}
    assert divide(packs, 40, None) == {"large": 30, "small": 10}
    assert divide(packs, 100, 0.5) == {"large": 75, "small": 25}  # 300 and 100 training pictures, 4 for each client


@pytest.mark.parametrize("number", [1, 41])
def test_more_or_fewer_than_fit_are_refused_in_one_line(number):
    packs = {"large": pack_of(num_training=60), "small": pack_of(num_training=20)}
    with pytest.raises(UserError, match=rf"--clients {number}: .* from 2 to 40 \(large: 30, small: 10\)"):
        divide(packs, number, None)


def test_the_sites_come_in_order_of_their_names_and_know_their_share(tmp_path):
    held = [site_settings("vgg", tmp_path), site_settings("celeba", tmp_path)]
    sites = VirtualSites(held, {"celeba": 2, "vgg": 12000}, alpha=0.5, seed=7)
    assert len(sites) == 12002
    assert [site.name for site in sites[:4]] == ["celeba-0001", "celeba-0002", "vgg-00001", "vgg-00002"]
    assert sites[12001].name == "vgg-12000"
    assert sites[3].state_dir == tmp_path / "vgg-00002"
    assert sites[3].data_dir == held[0].data_dir
    share = sites[3].share
    assert (share.number, share.num_clients, share.alpha, share.seed) == (1, 12000, 0.5, 7)
    assert len({site.name for site in sites}) == 12002
    assert [site.name for site in sites] == sorted(site.name for site in sites)
    with pytest.raises(IndexError):
        sites[12002]


@pytest.mark.parametrize(
    ("num_at_once", "num_cpus", "num_gpus", "cpus", "fraction"),
    [
        (2, 2, 0, 1, 0.0),
        (1, 8, 0, 8, 0.0),
        (1000, 8, 0, 1, 0.0),
        (1000, 8, 1, 1, 0.125),
        (3, 8, 1, 2, 0.333),
        (3, 8, 2, 2, 0.5),  # two on one, one on the other: nobody has parts of two
        (50, 16, 3, 1, 0.166),
        (1, 8, 4, 8, 1.0),
    ],
)
def test_the_actors_and_not_the_clients_divide_the_machine(num_at_once, num_cpus, num_gpus, cpus, fraction):
    each = resources_of_actor(num_at_once, num_cpus=num_cpus, num_gpus=num_gpus)
    assert (each.num_cpus, each.num_gpus) == (cpus, fraction)


@pytest.mark.parametrize(
    ("engine", "line"),
    [
        (Engine(num_virtual=0), "--clients 0: give a whole number, 1 or more"),
        (Engine(num_actors=-1), "--actors -1: give a whole number, 1 or more"),
        (Engine(partition="dirichlet:1"), "--partition dirichlet:1: give --clients N too"),
        (Engine(ray_address="127.0.0.1:1", num_actors=2), "--actors: a cluster's nodes say"),
        (Engine(ray_address="here"), "--ray-address here: write HOST:PORT"),
        (Engine(ray_address="127.0.0.1:1"), r"--ray-address 127.0.0.1:1: no Ray cluster answers there .*ray start"),
    ],
)
def test_what_cannot_be_simulated_is_said_before_any_picture_is_read(tmp_path, engine, line):
    with pytest.raises(UserError, match=line):
        federate_here(None, ["celeba=nowhere"], device="cpu", cache_dir=tmp_path, out=None, err=None, engine=engine)
