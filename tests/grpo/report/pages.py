"""Run folders with known content, and a check of the pages made from them."""

import html.parser

import numpy as np

from grpo.records.run_log import RunLog
from grpo.report.run_report import write_report

EVIL = 'A sign "OPEN" </article><script>alert(1)</script> & <img src="http://example.com/x.png">'


def evaluation(epoch, reward, n=8, prompts=None):
    """Return the record of an evaluation of n prompts with this mean reward."""
    prompts = prompts or [EVIL] + [f'A sign "WORD{i}"' for i in range(1, n)]
    rewards = [reward + (i - (n - 1) / 2) / 100 for i in range(n)]
    return {
        "epoch": epoch,
        "reward": reward,
        "low": reward - 0.04,
        "high": reward + 0.04,
        "num": n,
        "rewards": rewards,
        "prompts": prompts,
        "texts": ["<b>OPEM</b>"] * n,
        "seconds": 2.0,
        "failed_scores": 0,
    }


def epoch_record(e):
    """Return the metrics of epoch e; the gradient norm is largest in epoch 2."""
    return {
        "epoch": e,
        "reward_mean": 0.4 + e / 100,
        "ratio_max_error": 1e-7 * e,
        "grad_norm": 9.5 if e == 2 else 1.0,
        "failed_scores": 0,
        "videos": 16,
        "seconds": {"sample": 30.0 if e == 1 else 6.0, "update": 2.0, "total": 8.0},
    }


def report_of_run(
    folder, evals=((0, 0.46), (4, 0.61)), epochs=4, frames=1, size=(16, 32), previews=2
):
    """Write a run of `epochs` epochs, evaluated at `evals` (epoch, reward); return its page."""
    log = RunLog(folder)
    log.config(
        {
            "epochs": 4,
            "sample": {"steps": 10},
            "note": "<i>",
            "command": "python -m grpo.train --a='<x>'",
        }
    )
    for e in range(epochs + 1):
        if e:
            log.epoch(epoch_record(e))
        for when, reward in evals:
            if when == e:
                videos = np.random.default_rng(e).integers(
                    0, 256, (previews, frames, *size, 3), np.uint8
                )
                log.evaluation(evaluation(e, reward), videos)
    log.close()
    path = write_report(folder)
    assert path == folder / "report.html" and path.stat().st_size < 10_000_000
    return path.read_text()


class Page(html.parser.HTMLParser):
    """The tags, the text and all addresses of a page. Fails unless its tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.urls, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.urls += [
            v
            for k, v in attrs
            if k in ("src", "href", "xlink:href", "srcset", "data", "poster", "action")
        ]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.remove(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
