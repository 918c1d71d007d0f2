"""A cache that cannot be written is what is blamed, and not the data or the model that was to go into it."""

import errno
import os
from functools import partial

import datasets
import pytest

from pipeline.data.sources import DataError, load_reviews
from pipeline.models.loading import ModelError, opening
from pipeline.runtime.caches import cache_fault

REMEDY = "Make room or give rights there, or set {} (or HF_HOME for all caches) to a folder that can be written."


@pytest.fixture
def cache(tmp_path):
    """A folder that cannot be made, since a file is in its place."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "cache"


def test_local_files_need_no_cache(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    (tmp_path / "a.csv").write_text("text\na\n")
    assert load_reviews(str(tmp_path / "a.csv")).texts == ["a"]


def test_a_dataset_that_cannot_be_kept_names_the_cache(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    (tmp_path / "a.csv").write_text("text\na\n")
    prepared = partial(datasets.load_dataset, "csv", data_files=str(tmp_path / "a.csv"))  # as one from the Hub is
    monkeypatch.setattr("datasets.load_dataset", lambda _name, split: prepared(split=split))
    with pytest.raises(DataError) as caught:
        load_reviews("someone/reviews")
    assert str(caught.value) == (
        f"dataset='someone/reviews' cannot be loaded: the Hugging Face cache {cache} cannot be written (Not a "
        f"directory). {REMEDY.format('HF_DATASETS_CACHE')}"
    )


def test_a_model_that_cannot_be_kept_names_the_cache(cache, monkeypatch):
    monkeypatch.setattr("pipeline.models.loading.HF_HUB_CACHE", str(cache))
    with pytest.raises(ModelError) as caught, opening("someone/model", "model_path"):
        try:
            os.makedirs(cache / "models--someone--model")
        except OSError as error:  # as transformers does it
            raise OSError("a problem when downloading someone/model") from error
    assert str(caught.value) == (
        f"model_path='someone/model' cannot be loaded: the Hugging Face cache {cache} cannot be written (Not a "
        f"directory). {REMEDY.format('HF_HUB_CACHE')}"
    )


def test_a_full_disk_is_the_caches_and_a_file_elsewhere_is_not(cache, tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    assert "cannot be written (No space left on device)" in cache_fault(full, cache, "HF_HUB_CACHE")
    assert cache_fault(OSError(errno.EACCES, "denied", str(tmp_path / "model/config.json")), cache, "") is None
    assert cache_fault(OSError(errno.ENOENT, "no such file", str(cache / "config.json")), cache, "") is None
    assert cache_fault(ValueError("another"), cache, "") is None
