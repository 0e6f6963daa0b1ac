"""Allocations against every other way to choose, and against the bytes that converted models really take."""

import dataclasses
import itertools
from fractions import Fraction

import jax
import numpy as np
import pytest

import precision_lab as pl
from precision_lab.ptq.scores import Score

BITS = ["weight=int2@channel", "weight=int4@channel", "weight=int8@channel"]
RNG = np.random.default_rng(0)
PARAMS = {f"w{i}": RNG.normal(size=(16, 16)).astype(np.float32) for i in range(4)}


def four_layers(params, x):
    for w in params.values():
        x = jax.nn.relu(x @ w / 4)
    return x


@pytest.fixture(scope="module")
def table():
    return pl.sensitivity(four_layers, BITS, [RNG.normal(size=(32, 16)).astype(np.float32)], params=PARAMS)


def with_numbers(table, rng):
    """Returns a table of the same sites with damages and bytes drawn at random, ties included."""
    rows = [Score(row.site, row.policy, float(rng.integers(1, 9)), 0.0, 0.0) for row in table]
    costs = [
        dataclasses.replace(cost, nbytes=tuple(map(int, rng.integers(10, 60, size=len(table.names)))))
        for cost in table.costs
    ]
    return dataclasses.replace(table, rows=tuple(rows), costs=tuple(costs))


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_within_the_budget_does_less_damage(table, seed):
    rng = np.random.default_rng(seed)
    drawn = with_numbers(table, rng)
    damage = [[0.0, *(drawn.at(c.sites[0], name).one_on_error for name in drawn.names[1:])] for c in drawn.costs]
    everything = [
        (sum(cost.nbytes[i] for cost, i in zip(drawn.costs, each, strict=True)),
         sum(row[i] for row, i in zip(damage, each, strict=True)))
        for each in itertools.product(range(4), repeat=4)
    ]  # fmt: skip
    least = min(taken for taken, _ in everything)
    budget = int(rng.integers(least, least + 80))

    half_a_byte_more = Fraction(8 * budget + 4, sum(cost.elements for cost in drawn.costs))
    found = pl.allocate(drawn, half_a_byte_more)

    assert found.budget_bytes == budget
    best = min(harm for taken, harm in everything if taken <= budget)
    assert found.damage == best
    assert found.nbytes == min(taken for taken, harm in everything if harm == best)


def test_it_is_never_worse_than_one_policy_for_all_of_the_same_bytes(table):
    for name in table.names:
        size, uniform = sum(c.nbytes[table.names.index(name)] for c in table.costs), None

        found = pl.allocate(table, Fraction(8 * size, sum(cost.elements for cost in table.costs)))

        taken, uniform = found.uniform[name]
        assert taken == size >= found.nbytes
        assert found.damage <= uniform


def test_the_converted_model_takes_exactly_the_bytes_it_was_promised():
    """Check 34 of notes/jax_quantization.md; a lookup, layers in a scan, and rows that do not fill their bytes."""

    def net(params, tokens):
        x = params["table"][tokens]
        x = jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, params["stack"])[0]
        return x @ params["head"]

    shapes = {"table": (11, 24), "stack": (3, 24, 24), "head": (24, 5)}
    params = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tokens = np.arange(8)
    policies = ["weight=int2@channel,embedding=int4@channel", "weight=int4@group8,affine", "weight=int8@channel"]
    table = pl.sensitivity(net, policies, [tokens], params=params)

    for budget in (4.6, 8.7, 20):
        found = pl.allocate(table, budget)
        stored = pl.convert(net, found.policy, tokens, params=params)[1]

        taken = sum(np.asarray(x).nbytes for path in found.choices for x in jax.tree.leaves(stored[path]))
        assert taken == found.nbytes <= budget * found.elements / 8
        assert found.elements == 11 * 24 + 3 * 24 * 24 + 24 * 5
        assert len(set(found.choices.values())) > 1


def test_a_larger_budget_is_never_worse_and_the_largest_leaves_all_as_it_is(table):
    allocations = [pl.allocate(table, bits) for bits in (4, 5, 6, 8, 9, 12, 24, 32)]

    damages = [found.damage for found in allocations]
    assert damages == sorted(damages, reverse=True)
    assert damages[0] > damages[-1] == 0
    assert allocations[-1].policy == table.policies[0]


def test_the_policy_of_an_allocation_has_the_settings_that_were_chosen(table):
    found = pl.allocate(table, 7)

    for site in pl.sites(four_layers, PARAMS, np.ones((2, 16), np.float32), policy=found.policy):
        chosen = pl.Policy.parse(found.choices[site.path])
        assert (site.treatment.weight, site.treatment.activation) == (chosen.weight, chosen.activation)
    assert found.bits_per_parameter <= 7
    assert f"{found.nbytes} of {found.budget_bytes} bytes" in str(found)


def tied(params, tokens):
    return jax.nn.relu(params["table"][tokens] @ params["table"].T) @ params["table"]


BOTH = "weight=int8@channel,embedding=int8@channel"


def test_a_parameter_that_sites_share_has_one_policy_and_is_counted_once():
    table = pl.sensitivity(tied, [BOTH], [np.arange(16)], params={"table": PARAMS["w0"]})

    [cost] = table.costs
    found = pl.allocate(dataclasses.replace(table, costs=(dataclasses.replace(cost, nbytes=(1024, 320)),)), 11)

    assert cost.sites == tuple(table.sites)
    assert len(cost.sites) == 3
    assert cost.elements == 256
    assert found.choices == {"table": BOTH}
    assert found.bits_per_parameter == 10
    errors = [table.at(site, BOTH).one_on_error for site in cost.sites]
    assert min(errors) > 0
    assert found.damage == pytest.approx(sum(errors), rel=1e-12)


@pytest.mark.parametrize("policy", ["weight=int4@channel", "embedding=int4@channel"])
def test_a_tied_table_that_saves_nothing_says_why_and_what_would(policy):
    """Only one of its uses was quantized, so its bytes stay, and no allocation has a reason to choose that."""
    params, tokens = {"table": PARAMS["w0"], "w": PARAMS["w1"]}, np.arange(16)

    def net(params, tokens):
        return jax.nn.relu(params["table"][tokens] @ params["w"]) @ params["table"].T

    table = pl.sensitivity(net, [f"{policy};w:weight=int4@channel"], [tokens], params=params)
    found = pl.allocate(table, 19)

    name = f"{policy};w:weight=int4@channel"
    assert found.choices == {"table": "float32", "w": name}
    why = found.kept["table"][name]
    assert why.startswith("it is used in more than one way (")
    assert why.endswith("give its products and its lookups one quantizer: weight= and embedding=")
    assert "stored as it is: it is used in" in " ".join(str(found).split())
    with pytest.raises(ValueError, match=r"'table' saves nothing under .*: weight= and embedding="):
        pl.allocate(table, 8)
    both = pl.sensitivity(net, ["weight=int4@channel,embedding=int4@channel"], [tokens], params=params)
    assert pl.allocate(both, 19).kept == {}


@pytest.mark.parametrize(
    "policy",
    [
        BOTH,
        f"{BOTH};table:gather#0:embedding=none",
        f"{BOTH};table:gather#0:embedding=int4@channel",
        f"{BOTH};table:dot_general#1:weight=none",
        "weight=none,embedding=int8@channel;table:dot_general#1:weight=int8@channel,activation=int8@token",
    ],
)
@pytest.mark.parametrize("reference", ["float32", "compute=bfloat16;table:gather#0:embedding=int2@channel"])
def test_each_site_of_a_shared_parameter_has_the_settings_that_were_scored(policy, reference):
    """One rule by path reached the sites too at which the policy was as the reference."""
    params, tokens = {"table": PARAMS["w0"]}, np.arange(16)
    table = pl.sensitivity(tied, [policy], [tokens], params=params, reference=reference)
    [cost] = table.costs

    found = pl.allocate(dataclasses.replace(table, costs=(dataclasses.replace(cost, nbytes=(1024, 100)),)), 8)

    expected = pl.sites(tied, params, tokens, policy=policy)
    given = pl.sites(tied, params, tokens, policy=found.policy)
    assert [(site.name, site.settings) for site in given] == [(site.name, site.settings) for site in expected]


def test_the_loss_can_be_what_is_spared():
    x = RNG.normal(size=(32, 16)).astype(np.float32)
    pairs = [(x, x)]
    table = pl.sensitivity(four_layers, BITS, pairs, params=PARAMS, loss=lambda out, label: ((out - label) ** 2).mean())

    found = pl.allocate(table, 6, objective="loss")

    before = table.whole[0][1]
    per_site = [min(table.at(site, name).one_on_loss - before for name in BITS) for site in table.sites]
    assert sum(per_site) <= found.damage <= found.uniform[BITS[1]][1]


def with_losses(table, losses):
    """Returns a table in which each policy, the reference first, has the same loss at every site."""
    rows = [dataclasses.replace(row, one_on_loss=losses[table.names.index(row.policy)]) for row in table]
    return dataclasses.replace(table, rows=tuple(rows), whole=tuple((0.0, loss) for loss in losses))


def test_a_policy_whose_loss_is_no_number_is_the_worst_of_all(table):
    """A NaN hid every allocation that takes more bytes than the narrowest one, whose damage was NaN."""
    found = pl.allocate(with_losses(table, [0.25, np.nan, 0.5, 0.75]), 8, objective="loss")

    assert set(found.choices.values()) == {BITS[1]}
    assert found.damage == 4 * 0.25
    narrow = pl.allocate(with_losses(table, [0.25, np.nan, 0.5, 0.75]), 4, objective="loss")
    assert set(narrow.choices.values()) == {BITS[0]}
    assert narrow.damage == np.inf


def test_what_cannot_be_allocated_is_refused(table):
    with pytest.raises(ValueError, match=r"budget_bits=2 is 256 bytes, but these policies store at least 512: 4 bits"):
        pl.allocate(table, 2)
    with pytest.raises(ValueError, match="objective='loss' must be 'error', or 'loss' where"):
        pl.allocate(table, 8, objective="loss")
    for bits in (np.inf, np.nan):
        with pytest.raises(ValueError, match=f"budget_bits={bits}: expected a finite number of bits"):
            pl.allocate(table, bits)
    with pytest.raises(ValueError, match="loss under the reference 'float32' is nan"):
        pl.allocate(with_losses(table, [np.nan, 1.0, 1.0, 1.0]), 8, objective="loss")
