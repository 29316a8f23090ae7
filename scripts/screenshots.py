"""Takes the pictures of reports and help in docs/images, from small real runs and with a headless browser.

    python scripts/screenshots.py [--runs=build/screenshots] [--images=docs/images/screens]

Trains `configs/quickstart.py` with an evaluation in the middle, and compares two methods on two
seeds, unless the folder has these runs. Takes a quarter of an hour on two cores, seconds where the runs
exist. Needs Chromium or Chrome ($CHROMIUM, or in the PATH), and for the page of the
commands the site (scripts/docs.sh).
"""

import argparse
import html
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from PIL import Image, ImageChops

ROOT = pathlib.Path(__file__).parents[1]
SITE = ROOT / "docs/_build/html"  # by scripts/docs.sh
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
NARROWEST = 500  # pixels: a narrower window of a headless browser is this wide
MARGIN = 30  # pixels below the content of a page
COLORS = 256  # of a picture, which makes its file a third of the size
VIEWS = {  # name: width and height of the page in pixels, dark
    "desktop": (1100, 900, False),
    "phone": (390, 844, False),
    "dark": (1100, 900, True),
}
TRAIN = ["grpo.train", "--config=configs/quickstart.py", "--config.eval.every=5"]
COMPARE = [
    "grpo.compare",
    "--method=nft: configs/quickstart.py",
    "--method=flow_grpo: configs/tiny_grpo.py",
    "--common=eval.every=1 eval.num_prompts=16 sample.groups=4",
    "--budget=epochs:3",
    "--seeds=0,1",
]
HELP_PAGE = """<!doctype html><meta name=viewport content="width=device-width"><style>:root{{color-scheme:light dark}}
body{{margin:0;padding:20px;background:light-dark(#fcfcfa,#171716);color:light-dark(#1c1c1a,#ecece6)}}
pre{{font:13px/1.45 ui-monospace,'DejaVu Sans Mono',monospace;white-space:pre-wrap}}</style><pre>{text}</pre>"""


def find_browser() -> str | None:
    """Return the path of a browser, None without one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


def take(browser: str, page: pathlib.Path, picture: pathlib.Path, view: str) -> None:
    """Write the picture of the top of a page. Raises CalledProcessError where the browser fails."""
    width, height, dark = VIEWS[view]
    with tempfile.TemporaryDirectory() as folder:
        shown = pathlib.Path(folder, "frame.html")
        shown.write_text(
            f'<body style="margin:0"><iframe src="{page.resolve().as_uri()}" width="{width}" '
            f'height="{height}" style="border:0;display:block"></iframe>'
        )
        shot = pathlib.Path(folder, "shot.png")
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--virtual-time-budget=4000",
                f"--window-size={max(width, NARROWEST)},{height}",
                *["--force-dark-mode"] * dark,
                f"--screenshot={shot}",
                shown.as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
        image = trimmed(Image.open(shot).convert("RGB").crop((0, 0, width, height)))
        image.quantize(COLORS, dither=Image.Dither.NONE).save(picture, optimize=True)


def trimmed(image: Image.Image) -> Image.Image:
    """Return a picture without what is empty below its content, but for a margin."""
    background = Image.new("RGB", image.size, image.getpixel((0, 0)))
    content = ImageChops.difference(image, background).getbbox()
    bottom = min(content[3] + MARGIN, image.height) if content else image.height
    return image.crop((0, 0, image.width, bottom))


def train(folder: pathlib.Path) -> None:
    """Train, and keep the report of the evaluation in the middle as running.html."""
    run = folder / "quickstart"
    process = command([*TRAIN, f"--config.run_dir={run}"])
    while process.poll() is None:
        if len(evaluations(run)) == 2 and not (folder / "running.html").exists():
            time.sleep(5)  # the report is written after the evaluation's record
            shutil.copy(run / "report.html", folder / "running.html")
        time.sleep(1)
    if process.returncode:
        sys.exit(f"training ended with {process.returncode}")
    shutil.copy(run / "report.html", folder / "report.html")


def evaluations(run: pathlib.Path) -> list[dict]:
    """Return the finished evaluations of a run."""
    path = run / "evals.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def command(arguments: list[str]) -> subprocess.Popen:
    """Start a command of this project."""
    return subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "build/screenshots")
    parser.add_argument("--images", type=pathlib.Path, default=ROOT / "docs/images/screens")
    options = parser.parse_args()
    browser = find_browser()
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is in the PATH: install one, or set CHROMIUM")
    runs = options.runs.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    options.images.mkdir(parents=True, exist_ok=True)
    if not (runs / "report.html").exists():
        train(runs)
    compared = runs / "compared/comparison.html"
    if not compared.exists() and command([*COMPARE, f"--out={compared.parent}"]).wait():
        sys.exit("the comparison failed")
    shown = subprocess.run(
        [sys.executable, "-m", "grpo.train", "--help"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    page = runs / "help.html"
    page.write_text(HELP_PAGE.format(text=html.escape(f"$ wan-train --help\n{shown.stdout}")))
    for source in (runs / "running.html", runs / "report.html", compared, page):
        for view in VIEWS:
            if (source, view) == (page, "phone"):  # 100 columns do not fit
                continue
            take(browser, source, options.images / f"{source.stem}_{view}.png", view)
    commands = SITE / "reference/commands.html"
    if commands.exists():
        take(browser, commands, options.images / "commands_phone.png", "phone")


if __name__ == "__main__":
    main()
