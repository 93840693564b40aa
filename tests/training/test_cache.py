"""What decodes pictures is part of what names kept answers and kept models."""

import os
from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_dir

from distill.config import build
from distill.config.overrides import CONF
from distill.data.sources.decoders import Decoder, by_pillow, pillow
from distill.report.summary import run_metadata
from distill.teacher.teacher import Teacher
from distill.training import cache
from distill.training.fit import prepare_baseline
from tests.data.conftest import write_folder
from tests.data.sources.shard_cases import lose, write_shards


@pytest.fixture
def cfg(tmp_path):
    root = write_folder(tmp_path / "photos", ("train",), count=10, ext="jpg")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=[
            "data=folder", f"data.root={root}", "data.batch_size=4", "data.decoder=pil",
            "data.num_workers=0", "store=disk", f"paths.output_dir={tmp_path}",
            f"paths.cache={tmp_path / 'cache'}",
        ])  # fmt: skip


def with_decoder(data, decoder):
    other = data.with_options(seed=data.seed, batch_size=data.batch_size)
    other.view = replace(data.view, decoder=decoder)
    return other


def stored(cfg, data, split):
    teacher = Teacher(torch.nn.Flatten(), normalize=torch.nn.Identity())
    return cache.open_store(cfg, data, teacher, split, rank=0).folder


def test_another_decoder_has_a_store_of_its_own_for_what_it_decodes(cfg):
    data = build.build_data(cfg)
    newer = with_decoder(data, Decoder("pil", "libjpeg-turbo 99", by_pillow))
    other = with_decoder(data, Decoder("simplejpeg", "1.0", by_pillow))
    folders = {stored(cfg, one, "train") for one in (data, newer, other)}
    assert len(folders) == 3
    assert stored(cfg, with_decoder(data, pillow()), "train") in folders
    # Clean views are Pillow's whatever decodes the others.
    assert len({stored(cfg, one, "val") for one in (data, newer, other)}) == 1


def test_another_decoder_trains_another_model(cfg):
    data = build.build_data(cfg)
    other = with_decoder(data, Decoder("simplejpeg", "1.0", by_pillow))
    assert cache.fit_key(cfg, data) == cache.fit_key(cfg, with_decoder(data, pillow()))
    assert cache.fit_key(cfg, data) != cache.fit_key(cfg, other)


def test_the_summary_names_the_decoder(cfg):
    data = build.build_data(cfg)
    assert run_metadata(cfg, data)["decoder"] == str(pillow())


def test_a_model_that_was_trained_without_a_lost_shard_is_for_its_run_alone(tmp_path, caplog):
    root = write_shards(tmp_path / "shards")

    def composed(run):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", overrides=[
                "data=shards", f"data.root={root}", "data.broken=skip", "data.retries=0",
                "data.num_workers=0", "data.batch_size=18", "data.image_size=16", "teacher=none",
                "objective=supervised", "trainer.max_epochs=1", "trainer.accelerator=cpu",
                "logger=none", "callbacks=none", "report=false",
                f"paths.output_dir={tmp_path / run}",
                f"paths.cache={tmp_path / 'cache'}",
            ])  # fmt: skip

    def baseline(run, *paths):
        cfg = composed(run)
        data = build.build_data(cfg)
        lose(data, *paths)
        caplog.clear()
        prepare_baseline(cfg, data)
        return caplog.text, sorted(path.parent for path in tmp_path.rglob("distill.json"))

    shard = root / "train-0001.tar"
    content, about = shard.read_bytes(), shard.stat()
    said, (own,) = baseline("first", shard)
    assert own.is_relative_to(tmp_path / "first")
    assert "baseline: training went without 12 of its 36 images" in said
    shard.write_bytes(content)
    os.utime(shard, ns=(about.st_atime_ns, about.st_mtime_ns))
    said, there = baseline("first")  # as when it is resumed
    assert there == [own]
    assert "baseline: training went without 12 of its 36 images" in said
    said, there = baseline("second")
    assert "went without" not in said
    (other,) = set(there) - {own}
    assert other.parent == tmp_path / "cache"
    assert len({(path / "model.safetensors").read_bytes() for path in there}) == 2


def test_pictures_in_memory_have_none(cfg):
    cfg.data.resident = True
    data = build.build_data(cfg)
    assert data.decoded_by("train") is None
    assert run_metadata(cfg, data)["decoder"] is None
