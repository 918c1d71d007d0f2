"""The way of a training over the plane of KL and reward, and the figure."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.frontiers import Frontier
from pipeline.plane import POINTS, curve_of, draw_plane, way_of, way_of_steps
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


def test_steps_that_are_no_numbers_are_not_on_the_way():
    steps = [{"step": i, "kl/sequence_k1": kl, "reward/mean": 0.5} for i, kl in enumerate([0.0, None, 2.0])]
    assert [point["kl"] for point in way_of_steps(steps)] == [0.0, 2.0]


def small_frontier() -> Frontier:
    scores = torch.rand(8, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prices = torch.logspace(0, -2, 20, dtype=torch.float64)
    best = optimum(scores, prices)
    return Frontier(*(x.numpy() for x in (prices, best.reward.T, best.kl.T, best.effective_samples.T)), 200, {})


def test_the_curve_kept_for_reports_is_the_frontiers_and_its_band_is_about_it():
    frontier = small_frontier()
    curve = json.loads(json.dumps(curve_of(frontier), allow_nan=False))
    assert curve["kl"] == frontier.kls.mean(0).tolist() and curve["reward"] == frontier.rewards.mean(0).tolist()
    assert 0 < curve["trusted"] == len(curve["band_reward"]) < 20
    known = [
        i for i, low in enumerate(curve["band_kl_low"]) if low is not None and curve["band_kl_high"][i] is not None
    ]
    assert known and all(curve["band_kl_low"][i] <= curve["kl"][i] <= curve["band_kl_high"][i] for i in known)


@pytest.mark.parametrize("known", [True, False])
def test_the_figure_shows_run_and_frontier(tmp_path, known):
    side = {"mean": 0.5, "median": 0.5, "ci95": [0.4, 0.6]}
    figures = {
        "way": [{"step": 1, "kl": -0.01, "reward": 0.5}, {"step": 2, "kl": 1.0, "reward": 0.7}],
        "reward": {"name": "probability", "before": side, "after": side},
        "kl": 1.0,
        "kl_ci95": [0.9, 1.2],
    }
    draw_plane(tmp_path / "plane.png", figures, small_frontier() if known else None)
    pixels = np.asarray(Image.open(tmp_path / "plane.png").convert("RGB")).astype(int)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    assert ((red > 200) & (green < 60) & (blue < 70)).sum() > 50, "where the tuned model is"
    assert ((red > 230) & (green > 100) & (green < 150) & (blue < 40)).sum() > 100, "the way"
    assert (((blue > 150) & (red < 60)).sum() > 100) == known, "the frontier"
