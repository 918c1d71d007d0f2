"""The way of a training over the plane of KL and reward, and the figure."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.frontiers import Frontier
from pipeline.plane import POINTS, draw_plane, way_of
from pipeline.ppo.optimum import optimum


def metrics(path, steps):
    lines = [{"step": i + 1, "kl/sequence_k1": 0.1 * i, "reward/mean": i / steps} for i in range(steps)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_way_is_means_of_as_many_steps_as_make_few_points(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert way_of(file) == []
    metrics(file, 3)
    assert [point["step"] for point in way_of(file)] == [1, 2, 3]
    metrics(file, 2 * POINTS + 1)
    way = way_of(file)
    assert len(way) <= POINTS and way[0]["step"] == 3 and way[-1]["step"] == 2 * POINTS + 1
    assert way[0]["kl"] == pytest.approx(0.1) and way[0]["reward"] == pytest.approx(1 / (2 * POINTS + 1))


@pytest.mark.parametrize("known", [True, False])
def test_the_figure_shows_run_and_frontier(tmp_path, known):
    scores = torch.rand(8, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prices = torch.logspace(0, -2, 20, dtype=torch.float64)
    best = optimum(scores, prices)
    arrays = [x.numpy() for x in (prices, best.reward.T, best.kl.T, best.effective_samples.T)]
    side = {"mean": 0.5, "median": 0.5, "ci95": [0.4, 0.6]}
    figures = {
        "way": [{"step": 1, "kl": -0.01, "reward": 0.5}, {"step": 2, "kl": 1.0, "reward": 0.7}],
        "reward": {"name": "probability", "before": side, "after": side},
        "kl": 1.0,
        "kl_ci95": [0.9, 1.2],
    }
    draw_plane(tmp_path / "plane.png", figures, Frontier(*arrays, 200, {}) if known else None)
    pixels = np.asarray(Image.open(tmp_path / "plane.png").convert("RGB")).astype(int)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    assert ((red > 200) & (green < 60) & (blue < 70)).sum() > 50, "where the tuned model is"
    assert ((red > 230) & (green > 100) & (green < 150) & (blue < 40)).sum() > 100, "the way"
    assert (((blue > 150) & (red < 60)).sum() > 100) == known, "the frontier"
