"""The sample catalogue: equal on every run, skewed, and with the repeats it promises."""

import hashlib

import polars as pl
import pytest

from semids.errors import UsageError
from semids.items import CatalogueSettings, scan_texts
from semids.progress import silent
from semids.sample import write_sample_catalogue
from semids.stages import StageOutput


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "sample.parquet"
    write_sample_catalogue(path)
    return path


def test_equal_arguments_give_equal_bytes(sample, tmp_path):
    write_sample_catalogue(tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == sample.read_bytes()


def test_the_drawn_items_do_not_change_between_versions(sample):
    # The values, not the file: Parquet's bytes carry the version of the library that wrote them.
    digest = hashlib.sha256(pl.read_parquet(sample).write_csv().encode()).hexdigest()
    assert digest == "6f7c07b79b6a8c556d31bfb5bb75ce2c06d9796390131d112c63433850258c29"


def test_another_seed_gives_another_catalogue(sample, tmp_path):
    write_sample_catalogue(tmp_path / "other.parquet", seed=1)
    assert not pl.read_parquet(tmp_path / "other.parquet").equals(pl.read_parquet(sample))


def test_4096_ids_are_between_1_4_and_1_5_times_the_distinct_texts(sample, tmp_path):
    settings = CatalogueSettings(
        path=str(sample),
        template="{title}\nBrand: {brand}\n{description}",
        split_column="split",
        brand_column="brand",
        category_column="category",
    )
    summary = scan_texts(settings, StageOutput(tmp_path / "stage", "0" * 64, silent))
    assert summary["items"] == 3000
    assert summary["distinct_contents"] == 2820
    assert 1.4 < 4096 / summary["distinct_contents"] < 1.5  # 1.452
    assert not summary["quarantined"]


def test_splits_missing_parts_and_skew_are_as_described(sample):
    items = pl.read_parquet(sample)
    assert items["item_id"].n_unique() == len(items) == 3000
    assert 0.82 < (items["split"] == "train").mean() < 0.88  # 0.855
    assert 0.05 < items["brand"].null_count() / 3000 < 0.09  # 0.074
    assert 0.07 < items["description"].null_count() / 3000 < 0.13  # 0.106
    categories = items["category"].value_counts(sort=True)["count"]
    assert len(categories) == 8
    assert categories[0] > 5 * categories[-1]  # 1130 and 130


def test_near_duplicates_differ_in_a_colour_size_or_spelling(sample):
    same_but_for_the_title = (
        pl.read_parquet(sample)
        .drop_nulls("description")
        .unique(["title", "description", "brand", "category"])
        .group_by("description", "brand")
        .len()
        .filter(pl.col("len") > 1)
    )
    assert same_but_for_the_title["len"].sum() > 100  # 359


@pytest.mark.parametrize("items", [1, 2, 17])
def test_small_catalogues_have_as_many_items_as_asked(tmp_path, items):
    write_sample_catalogue(tmp_path / "small.parquet", items=items)
    assert len(pl.read_parquet(tmp_path / "small.parquet")) == items


def test_no_items_are_refused(tmp_path):
    with pytest.raises(UsageError, match="at least 1 item, got 0"):
        write_sample_catalogue(tmp_path / "none.parquet", items=0)
    assert list(tmp_path.iterdir()) == []
