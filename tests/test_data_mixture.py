"""Mixtures of sources: shares, order, processes, resuming, and the text that describes them."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from jointmae_hf import JointMAEConfig
from jointmae_hf.data.augmentation import Augmentation
from jointmae_hf.data.collation import PreTrainingCollator
from jointmae_hf.data.loading import PointClouds
from jointmae_hf.data.mixture import (
    BLOCK,
    MixedBatches,
    ProceduralClouds,
    ShuffledClouds,
    block_shares,
    finish_batch,
    open_sources,
    parse_mixture,
)
from jointmae_hf.data.procedural import procedural_clouds


NUM_POINTS = 64


def collator(seed=3, augmentation=None, agreement=0.0) -> PreTrainingCollator:
    config = JointMAEConfig.from_preset("tiny")
    config.num_points, config.agreement_loss_weight = NUM_POINTS, agreement
    return PreTrainingCollator(config, augmentation or Augmentation((1.0, 1.0), 0.0), seed)


def table(size, num_points=NUM_POINTS, seed=0) -> PointClouds:
    values = np.random.default_rng(seed).normal(size=(size * num_points, 3)).astype(np.float32)
    return PointClouds(values, np.arange(size + 1) * num_points)


def mixture(weights=None, **layout) -> MixedBatches:
    sources = {"procedural": ProceduralClouds(NUM_POINTS, 3), "table": ShuffledClouds(table(30), 3, 1)}
    weights = weights or {"procedural": 0.8, "table": 0.2}
    return MixedBatches(sources, weights, collator(), **{"batch_size": 8, **layout})


def test_every_block_holds_the_shares_exactly_and_no_cloud_is_left_out_or_repeated():
    batches = mixture({"procedural": 3, "table": 1})
    source, place = batches.locate(np.arange(3 * BLOCK))
    for block in range(3):
        assert Counter(source[block * BLOCK : (block + 1) * BLOCK]) == {0: 750, 1: 250}
    for which in (0, 1):
        of_source = place[source == which]
        np.testing.assert_array_equal(np.sort(of_source), np.arange(len(of_source)))
    assert not (source[:BLOCK] == source[BLOCK : 2 * BLOCK]).all()
    # Nearby batches differ little in what they are made of.
    assert 0.5 < (source.reshape(-1, 50) == 0).mean(1).min()


def test_locating_samples_one_by_one_gives_the_same_as_all_at_once():
    batches = mixture()
    samples = np.array([2005, 3, 999, 1000, 70])
    together = batches.locate(samples)
    for row, sample in enumerate(samples):
        alone = batches.locate(np.array([sample]))
        assert (alone[0][0], alone[1][0]) == (together[0][row], together[1][row])


def test_a_table_comes_in_whole_passes_of_different_order():
    clouds = table(7)
    source = ShuffledClouds(clouds, seed=1, key=1)
    passes = [source.take(range(7 * epoch, 7 * epoch + 7)) for epoch in range(2)]
    contents = {clouds[row].tobytes(): row for row in range(7)}
    orders = [[contents[cloud.tobytes()] for cloud in clouds_of_pass] for clouds_of_pass in passes]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(7)) and orders[0] != orders[1]
    other = ShuffledClouds(clouds, seed=1, key=2).take(range(7))
    assert [contents[cloud.tobytes()] for cloud in other] != orders[0]


def test_batches_hold_the_clouds_of_their_sources():
    batches = mixture()
    batch, position = batches[5]
    assert position is None and batch["point_values"].shape == (8, NUM_POINTS, 3)
    source, place = batches.locate(batches.samples(5))
    assert set(source) == {0, 1}
    shapes = procedural_clouds(place[source == 0], NUM_POINTS, seed=3)
    torch.testing.assert_close(batch["point_values"][torch.from_numpy(source == 0)], shapes, atol=1e-5, rtol=0)


def test_a_batch_is_a_function_of_its_number():
    batches, again = mixture(), mixture()
    for number in (4, 0, 130):
        first, second = batches[number][0], again[number][0]
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name])


@pytest.mark.parametrize(("num_processes", "accumulation"), [(2, 1), (1, 2), (2, 2)])
def test_processes_and_accumulation_share_the_same_samples(num_processes, accumulation):
    whole = mixture()
    parts = [
        mixture(num_processes=num_processes, process_index=index, accumulation=accumulation)
        for index in range(num_processes)
    ]
    for step in (0, 7):
        numbers = range(step * accumulation, (step + 1) * accumulation)
        values = [part[number][0]["point_values"] for number in numbers for part in parts]
        assert torch.equal(torch.cat(values), whole[step][0]["point_values"])


def test_batches_made_in_one_go_are_those_made_one_by_one():
    batches = mixture()
    assert batches.batches_at_once == 8
    numbers = [3, 4, 5, 200]
    for number, (batch, _) in zip(numbers, batches.__getitems__(numbers), strict=True):
        assert all(torch.equal(batch[name], tensor) for name, tensor in batches[number][0].items())


@pytest.mark.parametrize("agreement", [0.0, 1.0])
@pytest.mark.parametrize("weights", [{"procedural": 0.7, "table": 0.3}, {"procedural": 1}, {"table": 1}])
def test_shapes_that_are_made_later_give_the_same_batches(weights, agreement):
    num_points = NUM_POINTS * (2 if agreement else 1)
    sources = {"procedural": ProceduralClouds(num_points, 3), "table": ShuffledClouds(table(30, 50), 3, 1)}
    sources = {name: sources[name] for name in weights}
    augmented = collator(augmentation=Augmentation((0.5, 1.5), 0.3, "so3", 20, 0.05), agreement=agreement)
    now, later = (MixedBatches(sources, weights, augmented, batch_size=8, deferred=d) for d in (False, True))
    loader = DataLoader(later, batch_sampler=[[0, 1], [2]], collate_fn=list, num_workers=1)
    for number, (batch, _) in enumerate(chain.from_iterable(loader)):
        batch = finish_batch(batch, torch.device("cpu"))
        wanted = now[number][0]
        assert batch.keys() == wanted.keys() and ("second_point_values" in batch) == (agreement > 0)
        for name in wanted:
            torch.testing.assert_close(batch[name], wanted[name], atol=1e-5, rtol=0)


def test_a_data_loader_with_workers_gives_the_same_batches():
    batches = mixture()
    loader = DataLoader(batches, batch_size=None, sampler=range(2, 5), num_workers=2)
    for number, (batch, _) in zip(range(2, 5), loader, strict=True):
        assert torch.equal(batch["point_values"], batches[number][0]["point_values"])


def test_no_two_samples_share_their_random_numbers():
    batches = mixture({"procedural": 1, "table": 1})
    noise = torch.cat([batches[number][0]["point_noise"] for number in range(4)])
    assert len(torch.unique(noise, dim=0)) == len(noise)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("procedural:0.8,kicad:0.2", {"procedural": 0.8, "kicad": 0.2}),
        ("procedural", {"procedural": 1.0}),
        (" org/shapes , data/parts/*.parquet:3 ", {"org/shapes": 1.0, "data/parts/*.parquet": 3.0}),
        ("procedural : 0.8 , my shapes\t: 2", {"procedural": 0.8, "my shapes": 2.0}),
        ("C:/shapes:2,D:/more", {"C:/shapes": 2.0, "D:/more": 1.0}),
    ],
)
def test_mixtures_are_read(text, weights):
    assert parse_mixture(text) == weights


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected NAME:WEIGHT"),
        (":0.5,a", "`train_data` has the item ':0.5'"),
        (" : 0.5,a", "`train_data` has the item ': 0.5'"),
        ("a:1,a:2", "names 'a' twice"),
        ("a:1,a :2", "names 'a' twice"),
        ("a:0", "'a' the weight 0.0"),
        ("a:-1", "expected a positive number"),
        ("a:nan", "expected a positive number"),
        ("a:inf", "expected a positive number"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mixture(text)


def test_shares_are_proportional_and_complete():
    assert block_shares({"a": 0.8, "b": 0.2}) == [800, 200]
    assert block_shares({"a": 1, "b": 1, "c": 1}) == [334, 333, 333]
    with pytest.raises(ValueError, match="'b' is 0.0001"):
        block_shares({"a": 1.0, "b": 0.0001})


def test_sources_are_opened_by_name(tmp_path):
    import datasets

    clouds = table(5)
    rows = {"points": [clouds[row].tolist() for row in range(5)]}
    features = datasets.Features({"points": datasets.Array2D((NUM_POINTS, 3), "float32")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "parts.parquet")
    path = str(tmp_path / "parts.parquet")
    sources = open_sources(["procedural", path], NUM_POINTS, seed=3)
    assert [cloud.shape for cloud in sources[path].take([0, 4])] == [(NUM_POINTS, 3)] * 2
    np.testing.assert_array_equal(sources["procedural"].take([6])[0], procedural_clouds([6], NUM_POINTS, 3)[0])
    batches = MixedBatches(sources, {"procedural": 1, path: 1}, collator(), batch_size=4)
    fingerprint = batches.fingerprint()
    assert fingerprint[0]["seed"] == 3 and fingerprint[1]["share"] == 0.5 and fingerprint[1]["clouds"] == 5
    other = MixedBatches(sources, {"procedural": 2, path: 1}, collator(), batch_size=4)
    assert other.fingerprint() != fingerprint


def test_sources_are_opened_in_the_configuration_asked_for(tmp_path):
    import datasets

    for number, name in enumerate(("small", "large"), start=1):
        folder = tmp_path / "sets" / name
        folder.mkdir(parents=True)
        datasets.Dataset.from_dict({"points": [table(1)[0].tolist()] * number}).to_parquet(folder / "train.parquet")
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("small", "large"))
    (tmp_path / "sets" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    path = str(tmp_path / "sets")
    sources = open_sources(["procedural", path], NUM_POINTS, seed=3, config_name="large")
    assert sources[path].fingerprint()["clouds"] == 2
