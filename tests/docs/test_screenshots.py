"""scripts/screenshots.py takes pictures of a page at the sizes and in the colours that it names."""

import pytest
from PIL import Image

from tests.docs.test_pages import script

screenshots = script("scripts/screenshots.py")
PAGE = """<style>body { margin: 0; background: #ffffff }
@media (max-width: 400px) { body { background: #ff0000 } }
@media (prefers-color-scheme: dark) { body { background: #000000 } }</style><body></body>"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "view, size, colour",
    [("phone", (390, 844), (255, 0, 0)), ("dark", (1100, 900), (0, 0, 0))],
)
def test_a_view_has_its_size_and_its_colours(tmp_path, view, size, colour):
    browser = screenshots.find_browser()
    if browser is None:
        pytest.skip("no Chromium")
    page = tmp_path / "page.html"
    page.write_text(PAGE)
    screenshots.take(browser, page, tmp_path / "a.png", view)
    picture = Image.open(tmp_path / "a.png").convert("RGB")
    assert picture.size == size
    assert {picture.getpixel((5, 5)), picture.getpixel((size[0] - 5, size[1] - 5))} == {colour}


def test_what_is_empty_below_the_content_is_cut():
    picture = Image.new("RGB", (100, 200), "white")
    assert screenshots.trimmed(picture).size == (100, 200)
    picture.putpixel((5, 50), (0, 0, 0))
    assert screenshots.trimmed(picture).size == (100, 51 + screenshots.MARGIN)
    picture.putpixel((5, 199), (0, 0, 0))
    assert screenshots.trimmed(picture).size == (100, 200)
