"""A simulated data set in MIND's format: nobody read these news, and nothing measured on them says anything of people.

A user has one of three topics and clicks the one news of it that is shown; titles are made of a topic's words.
"""

import random
from pathlib import Path

WORDS = {"sports": "goal team coach match", "music": "song band stage album", "food": "soup bread chef spice"}


def news_line(number, topic, rng, title=None, abstract="An abstract."):
    title = " ".join(rng.sample(WORDS[topic].split(), 2)) if title is None else title
    return f"N{number}\t{topic}\t{topic}-sub\t{title}\t{abstract}\thttps://news.test/{number}\t[]\t[]"


def write(folder: Path, first: int, impressions: int, seed: int = 0, extra_news=(), extra_impressions=()) -> Path:
    """A folder of 30 news numbered from `first`, ten of each topic, and impressions of one click among four."""
    rng, topics = random.Random(seed), list(WORDS)
    folder.mkdir()
    by_topic = {topic: [first + 3 * n + place for n in range(10)] for place, topic in enumerate(topics)}
    lines = [news_line(number, topic, rng) for topic in topics for number in by_topic[topic]]
    (folder / "news.tsv").write_text("\n".join([*lines, *extra_news]) + "\n")
    rows = []
    for number in range(impressions):
        topic = rng.choice(topics)
        *history, click = rng.sample(by_topic[topic], 4)
        shown = [f"N{click}-1"]
        shown += [f"N{rng.choice(by_topic[other])}-0" for other in topics if other != topic]
        rng.shuffle(shown)
        read = " ".join(f"N{one}" for one in history)
        rows.append(f"{number + 1}\tU{number}\t11/15/2019 8:55:22 AM\t{read}\t{' '.join(shown)}")
    (folder / "behaviors.tsv").write_text("\n".join([*rows, *extra_impressions]) + "\n")
    return folder
