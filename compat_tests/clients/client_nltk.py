"""nltk: texts tokenized, stemmed and counted by workers; the counts are put together."""

import sysconfig
from pathlib import Path
from typing import Any

import nltk
from nltk.metrics import edit_distance
from nltk.stem import SnowballStemmer
from nltk.tokenize import TreebankWordTokenizer

from compat_tests.clients.doors import Doors, worked, workload

_STEMMER = SnowballStemmer("english")


def count(text: str) -> Any:
    worked()
    return nltk.FreqDist(_STEMMER.stem(token) for token in TreebankWordTokenizer().tokenize(text))


def distance(a: str, b: str) -> int:
    worked()
    return int(edit_distance(a, b, transpositions=True))


@workload
def with_pool(doors: Doors) -> Any:
    texts = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))]
    total = nltk.FreqDist()
    with doors.Pool() as pool:
        for counts in pool.imap(count, texts * 4):
            total.update(counts)
    return total.most_common()


@workload
def with_executor(doors: Doors) -> Any:
    words = ["intention", "execution", "rain", "shine", "acheive", "achieve"]
    with doors.ProcessPoolExecutor() as executor:
        return list(executor.map(distance, words * 6, [word for word in words for _ in words], chunksize=4))
