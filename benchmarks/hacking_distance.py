"""How much training has changed the pictures outside of the text.

    python -m benchmarks.hacking_distance RUN

The held-out evaluations of a run sample the same prompts from the same noise. The distance of a video
is the mean absolute difference of its pixels, 0 to 255, from those before training, outside of the
boxes of the text that is read in either, grown by `GROWN` pixels. RUN/distance.json gets the mean over
the previews of the last evaluation (`eval.previews`), its 95 % interval, the mean inside and the
held-out reward; `earlier` has the same of the evaluations between, so that runs can be compared at
equal reward.
"""

import json
import pathlib
import sys

import numpy as np

from grpo.records import run_log
from grpo.records.statistics import bootstrap_interval
from rewards.ocr.rules import OCRReward

GROWN = 8  # pixels: a cell of the latents
RESULT = "distance.json"


def text_mask(video: np.ndarray, reader: OCRReward) -> np.ndarray:
    """Return where text is read in a video uint8 [T, H, W, 3], bool [T, H, W]. Frames that are not
    judged have the boxes of the judged one before.
    """
    score = reader.score(video, ("text",))
    mask = np.zeros(video.shape[:3], bool)
    height, width = video.shape[1], video.shape[2]
    ends = (*score.frames[1:], len(video))
    for first, end, boxes in zip(score.frames, ends, score.boxes):
        for left, top, right, bottom in boxes:
            rows = slice(max(int(top * height) - GROWN, 0), int(np.ceil(bottom * height)) + GROWN)
            columns = slice(max(int(left * width) - GROWN, 0), int(np.ceil(right * width)) + GROWN)
            mask[first:end, rows, columns] = True
    return mask


def distances(before, texts, after, reader) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance of each video outside of and inside the text, [n] each; nan where there is
    no such pixel. before, after: uint8 [n, T, H, W, 3]. texts: the masks of the text in `before`.
    """
    found = []
    for old, text, new in zip(before, texts, after):
        difference = np.abs(new.astype(np.float64) - old).mean(axis=-1)
        text = text | text_mask(new, reader)
        found.append([difference[m].mean() if m.any() else np.nan for m in (~text, text)])
    outside, inside = np.array(found).T
    return outside, inside


def main(folder: str) -> None:
    """Write the result of a run."""
    run = pathlib.Path(folder)
    shown = [
        (e, videos)
        for e in run_log.read_evaluations(run)
        if (videos := run_log.read_previews(run, e["epoch"])) is not None
    ]
    if len(shown) < 2:
        sys.exit(f"{run} has previews of {len(shown)} evaluations, but a distance needs two")
    reader, before, results = OCRReward("spelling", boxes=True), shown[0][1], []
    texts = [text_mask(video, reader) for video in before]
    for evaluation, after in shown[1:]:
        outside, inside = distances(before, texts, after, reader)
        mean, low, high = bootstrap_interval(outside)
        results.append(
            {
                "epoch": evaluation["epoch"],
                "reward": evaluation["reward"],
                "videos": len(after),
                "outside": mean,
                "low": low,
                "high": high,
                "inside": float(np.nanmean(inside)),
            }
        )
    *earlier, last = results
    (run / RESULT).write_text(json.dumps(last | {"earlier": earlier}) + "\n")
    print(json.dumps(last))


if __name__ == "__main__":
    main(sys.argv[1])
