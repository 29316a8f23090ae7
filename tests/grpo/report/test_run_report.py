"""A run's report: its content, embedded pictures, and runs whose records are incomplete."""

import base64
import html
import io
import re

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from grpo.records.run_log import RunLog
from grpo.report.run_report import summary_lines, write_report
from tests.grpo.report.pages import EVIL, Page, epoch_record, evaluation, report_of_run


def test_whole_report(tmp_path):
    text = report_of_run(tmp_path / "a<b>")
    page = Page(text)
    words = page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert (
        "OCR reward 0.46 → 0.61 on 8 held-out prompts. The 95 % confidence intervals [0.42, 0.50] "
        "and [0.57, 0.65] do not overlap."
    ) in words
    assert "+0.15" in words and "8 : 0" in words
    assert "9.5 (epoch 2)" in words, "the worst gradient norm"
    assert re.search(r"sampling\s*6.00\s*75%\s*30.00", words), (
        "the first epoch compiles and is not in the mean"
    )
    assert "sample.steps" in words and "python -m grpo.train --a='<x>'" in words
    small = ["reward", "gradient norm", "first update's |ratio − 1|"]
    assert [
        html.unescape(t) for t in re.findall("<figcaption>([^<]*)</figcaption>\n<b>", text)
    ] == small
    assert (
        text.count("<svg") == 2 + len(small)
        and "held-out prompts</text>" in text
        and "epoch</text>" in text
    )
    assert not re.search("#[0-9a-f]{6}", text[text.index("<svg") : text.index("<figcaption")]), (
        "colours are the page's"
    )


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    text = report_of_run(tmp_path)
    page = Page(text)
    assert page.urls and all(u.startswith(("data:", "#")) for u in page.urls)
    assert not re.search(r"https?://", text.replace("http://example.com/x.png", ""))
    assert (
        "@import" not in text
        and "url(" not in re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    )


def test_text_is_escaped(tmp_path):
    text = report_of_run(tmp_path)
    page = Page(text)
    assert "script" not in page.tags and "b" in page.tags
    assert (
        EVIL not in text
        and EVIL in html.unescape(text)
        and "<b>OPEM" not in text
        and "<q>&lt;b&gt;OPEM" in text
    )
    assert "asked for “OPEN”, “http://example.com/x.png”" in html.unescape(text)


def test_pictures_are_the_previews(tmp_path):
    text = report_of_run(tmp_path)
    found = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(d))))
        for d in re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    ]
    assert len(found) == 4  # prompt by prompt, before and after
    for picture, (when, i) in zip(found, ((0, 0), (4, 0), (0, 1), (4, 1))):
        expected = np.random.default_rng(when).integers(0, 256, (2, 1, 16, 32, 3), np.uint8)[i, 0]
        np.testing.assert_array_equal(picture, expected)
    for i in range(2):  # the same, both in one file
        pair = np.asarray(Image.open(tmp_path / "side_by_side" / f"00{i}.png"))[::12, ::12]
        np.testing.assert_array_equal(
            np.concatenate([pair[:, :32], pair[:, 36:]]), np.concatenate(found[2 * i :][:2])
        )
    assert text.count('class="tiny"') == 4 and "width:384px" in text, "16 pixels are shown 192 high"


@pytest.mark.slow
def test_clips_are_videos(tmp_path):
    text = report_of_run(tmp_path, frames=5)
    assert text.count('src="data:video/mp4;base64,') == 4 and "data:image" not in text
    assert sorted(p.name for p in (tmp_path / "side_by_side").iterdir()) == ["000.mp4", "001.mp4"]
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "side_by_side" / "000.mp4"))
    assert next(reader)["size"] == (12 * (32 + 4 + 32), 12 * 16) and len(list(reader)) == 5
    Page(text)


@pytest.mark.slow
def test_large_previews_stay_in_budget(tmp_path):
    """Noise cannot be compressed: 10 pictures of 600 x 800 would be 19 MB of text as PNG."""
    text = report_of_run(tmp_path, size=(600, 800), previews=5)
    assert text.count('src="data:image/jpeg;base64,') == 10


@pytest.mark.parametrize(
    "rewards, verdict",
    [((0.46, 0.61), "do not overlap"), ((0.46, 0.50), "overlap"), ((0.61, 0.46), "do not overlap")],
)
def test_summary(tmp_path, rewards, verdict):
    log = RunLog(tmp_path)
    for e, reward in zip((0, 4), rewards):
        log.evaluation(evaluation(e, reward))
    log.close()
    a, b = rewards
    assert summary_lines(tmp_path) == [
        f"OCR reward {a:.2f} -> {b:.2f} (95 % CI [{a - 0.04:.2f}, {a + 0.04:.2f}] -> "
        f"[{b - 0.04:.2f}, {b + 0.04:.2f}], 8 held-out prompts; intervals {verdict})",
        f"report: {tmp_path / 'report.html'}",
    ]


def test_one_evaluation_and_a_run_cut_short(tmp_path):
    text = report_of_run(tmp_path, evals=((0, 0.46),), epochs=2)
    assert "one evaluation so far" in text and "Epoch 2 of 4: the run is not finished." in text
    assert "Before and after" not in text and text.count("data:image/png") == 2
    assert summary_lines(tmp_path)[0].startswith(
        "OCR reward 0.46 (95 % CI [0.42, 0.50], 8 held-out prompts; one"
    )


@pytest.mark.parametrize(
    "epochs, written",
    [
        (2, "epoch 2 of 4; about 18 s left."),
        (4, "after 4 epochs: the run is finished."),
    ],
)
def test_when_it_was_written(tmp_path, epochs, written):
    """Two epochs that are left take 8 s each, and the last evaluation 2 s."""
    text = report_of_run(tmp_path, evals=((0, 0.46),), epochs=epochs)
    words = Page(text).text
    assert re.search(r"Written at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, ", words)
    assert written in words
    assert f'<progress max="4" value="{epochs}"' in text


def test_an_evaluation_alone_has_no_progress(tmp_path):
    """As `grpo.evaluate` leaves it; a run of training that has not trained yet is at epoch 0."""
    report_of_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    text = write_report(tmp_path).read_text()
    assert "<progress" not in text and re.search(r"Written at [-\d]+ [:\d]+ UTC\.<", text)
    (tmp_path / "checkpoints").mkdir()
    assert " UTC, epoch 0 of 4.<" in write_report(tmp_path).read_text()


def test_pages_can_be_read_by_ear(tmp_path):
    """Pictures, curves and tables say what they show; heads of rows and columns are marked."""
    text = html.unescape(report_of_run(tmp_path))
    assert f'alt="sample after epoch 4 for the prompt: {EVIL}"' in text
    assert text.count("<svg") == text.count('role="img" aria-label="')
    assert text.count("<table") == text.count("<caption>") >= 4
    assert not re.search("<th>", text) and '<th scope="col">reward after 4</th>' in text
    assert '<th scope="row">gradient norm</th>' in text


def test_a_page_without_pairs_leaves_them(tmp_path):
    report_of_run(tmp_path)
    (tmp_path / "side_by_side" / "000.png").unlink()
    write_report(tmp_path, pairs=False)
    assert not (tmp_path / "side_by_side" / "000.png").exists()


def test_pairs_of_an_earlier_evaluation_are_not_left(tmp_path):
    """As by `grpo.evaluate` with a checkpoint, and then without one into the same folder."""
    report_of_run(tmp_path)
    assert len([*(tmp_path / "side_by_side").iterdir()]) == 2
    RunLog(tmp_path, resume_epoch=4).close()
    assert len([*(tmp_path / "side_by_side").iterdir()]) == 2
    RunLog(tmp_path).close()
    assert not [*(tmp_path / "side_by_side").iterdir()]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl", "evals.jsonl", "previews"])
def test_missing_parts(tmp_path, missing):
    report_of_run(tmp_path)
    (tmp_path / missing).rename(tmp_path / "gone")
    text = write_report(tmp_path).read_text()
    Page(text)
    if missing == "evals.jsonl":
        assert (
            "No held-out evaluation was recorded." in text
            and "no held-out" in summary_lines(tmp_path)[0]
        )
    else:
        assert "0.46 → 0.61" in text


def test_empty_folder_and_no_folder(tmp_path):
    Page(write_report(tmp_path).read_text())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_masked_and_broken_numbers(tmp_path):
    log = RunLog(tmp_path)
    log.epoch(epoch_record(1) | {"grad_norm": float("nan"), "reward_mean": float("nan")})
    for e in (0, 1):
        record = evaluation(e, 0.5)
        record["rewards"][e] = float("nan")
        log.evaluation(
            record | {"failed_scores": 1, "num": 7}, np.zeros((2, 1, 16, 32, 3), np.uint8)
        )
    log.close()
    text = write_report(tmp_path).read_text()
    assert "not scored" in text and "1 of 8 samples" in text and "nan (epoch 1)" in text


def test_evaluations_without_a_result_are_left_out_and_named(tmp_path):
    """Also if there is no other one."""
    log, nothing = RunLog(tmp_path), dict.fromkeys(("reward", "low", "high"), float("nan"))
    log.epoch(epoch_record(1) | {"failed_rewards": {"motion": 3}, "nonfinite_videos": 2})
    log.evaluation(evaluation(0, 0.4) | nothing | {"rewards": [float("nan")] * 8, "num": 0})
    assert summary_lines(tmp_path)[0] == "no held-out evaluation has a result"
    assert "No held-out evaluation has a result." in write_report(tmp_path).read_text()
    log.evaluation(evaluation(1, 0.5))
    log.close()
    text = write_report(tmp_path).read_text()
    assert "OCR reward 0.50" in text and "no result of the evaluation after epoch 0" in text
    assert "no result of the evaluation after epoch 0" in summary_lines(tmp_path)[1]
    assert (
        "motion could not be measured for 3 videos" in text and "videos that are not finite" in text
    )


def test_other_evaluations_are_listed(tmp_path):
    log = RunLog(tmp_path)
    for when, reward in ((0, 0.25), (4, 0.75)):
        log.evaluation(evaluation(when, 0.5))
        log.evaluation(evaluation(when, reward), series=33)
        log.evaluation(evaluation(when, 1 - reward, n=4), series="long")
    log.close()
    text = write_report(tmp_path).read_text()
    rows = re.findall(r"<th[^>]*>(33 frames|long)</th>(.*?)</tr>", text, re.DOTALL)
    cells = [
        [name, *(re.sub("<.*?>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", rest))]
        for name, rest in rows
    ]
    assert cells == [
        ["33 frames", "8", "0.25 [0.21, 0.29], epoch 0", "0.75 [0.71, 0.79], epoch 4"],
        ["long", "4", "0.75 [0.71, 0.79], epoch 0", "0.25 [0.21, 0.29], epoch 4"],
    ]
    assert "Other evaluations" not in report_of_run(tmp_path / "without")
