"""docs/evaluation.md: what a found network reached, beside a linear classifier on the same images.

`python benchmarks/worth.py --data FILE RUN...`: RUNs are the folders of `ftso evaluate --out`, one a seed.
"""

import argparse
import datetime
import json
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from tables import aligned

from ftso_fast import Genotype
from ftso_fast.image_set import ImageSet, image_set

PAGE = Path(__file__).resolve().parent.parent / "docs" / "evaluation.md"
TEXT = """\
# A found network, trained

Made by `benchmarks/worth.py`, {date}; do not edit. The genotype:

    {genotype}

Recipe {recipe}: {network}; {training}. Tested on {testing}. {machine}.

{table}

The mean of the last: {mean}. A linear classifier (logistic regression on the same normalised pixels, {strength}
on the test images themselves): {linear}.

A small network on a fifth of CIFAR-10, trained for minutes, with a batch and a rate that nobody tuned: these figures
say that the chain from a search to a tested network works, and nothing about how the genotype compares.
"""
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2)


def linear(train: ImageSet, test: ImageSet) -> tuple[float, float]:
    """(accuracy, C) of the best logistic regression on the pixels, its strength chosen on the very test images."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    def pixels(data: ImageSet) -> Any:
        return np.concatenate([batch.images.flatten(1).numpy() for batch in data.test_batches(500)])

    x, held, found = pixels(train), pixels(test), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for C in STRENGTHS:
            fitted = LogisticRegression(C=C, max_iter=100).fit(x, train.labels)
            found.append((float((fitted.predict(held) == test.labels).mean()), C))
    return max(found)


def page(results: list[dict[str, Any]], baseline: tuple[float, float]) -> str:
    first = results[0]
    accuracy, C = baseline
    cells = [["seed", "last", "best (epoch)", "top 5, last", "minutes", "images a second", "peak MB", "over linear"]]
    for r in results:
        over = 100 * (r["eval_accuracy_last"] - accuracy)
        cells.append([str(r["seed"]), f"{r['eval_accuracy_last']:.2%}"])
        cells[-1] += [f"{r['eval_accuracy_best']:.2%} ({r['best_epoch'] + 1})", f"{r['eval_top5_last']:.2%}"]
        cells[-1] += [f"{r['seconds'] / 60:.1f}", f"{r['images_per_second']:.0f}", f"{r['peak_bytes'] / 1e6:.0f}"]
        cells[-1].append(f"{over:+.1f} points")
    recipe, n = first["recipe"], f"{first['test_images']:,}"
    values = {
        "genotype": repr(Genotype.from_dict(first["genotype"])),
        "network": f"{recipe['cells']} cells of {recipe['channels']} channels, {first['params']:,} parameters",
        "training": f"{recipe['epochs']} epochs of {first['train_images']:,} images of {first['data']}, "
        f"batch {recipe['batch_size']}",
        "testing": f"{n} images: {first['tested_on']}",
        "machine": f"{first['backend']}, {first['threads']} threads",
        "mean": f"{mean(r['eval_accuracy_last'] for r in results):.2%}",
        "linear": f"{accuracy:.2%}",
        "strength": f"C = {C:g}, the best of {', '.join(f'{c:g}' for c in STRENGTHS)}",
        "table": "\n".join(aligned(cells)),
        "recipe": recipe["name"],
        "date": str(datetime.date.today()),
    }
    return TEXT.format(**values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("runs", nargs="+", type=Path)
    args = parser.parse_args()
    results = [json.loads((run / "result.json").read_text()) for run in args.runs]
    baseline = linear(image_set(args.data), image_set(args.data, split="test"))
    PAGE.write_text(page(results, baseline))
