"""The page in a real browser against the real service: what a person does, sees and hears.

In every test the page asks no other host, and its console stays free of errors but for the statuses
that a test expects.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from clips import moving_square, write_clip
from PIL import Image

pytest.importorskip("fastapi", reason="the service is an extra: pip install 'mmrec[serve]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

import pyarrow as pa  # noqa: E402
from serving import service_on  # noqa: E402

from mmrec import Matcher  # noqa: E402
from mmrec.retrieval.index import ProductIndex  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SCRIPT = "<script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"
TOKEN = "a-token-of-the-tests"
# Contrast of text to its ground by WCAG 2.2, and of what stands on a coloured one.
CONTRAST = """(selector) => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => parts(color).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const element = document.querySelector(selector);
  let ground = element;
  while (parts(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
  const two = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor].map(light);
  return (Math.max(...two) + 0.05) / (Math.min(...two) + 0.05);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """One Chromium for all of the file."""
    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_index(index: Path) -> Path:
    """The tiny catalogue, and beside its first product one more, whose title is HTML."""
    copy = index.parent / "page-index"
    shutil.copytree(index, copy)
    changed = ProductIndex.load(copy, device="cpu")
    vector = changed.vectors([changed.products["product_id"][0].as_py()])
    own = pa.table({"product_id": ["p/script"], "title": [SCRIPT]})
    changed.upsert(["p/script"], vector, own)
    return copy


@pytest.fixture(scope="module")
def service(page_index: Path) -> Iterator[str]:
    """The service, which takes uploads of a megabyte."""
    with service_on(page_index, max_upload_mb=1.0, max_images=3) as served:
        yield served.url


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video that no training has seen."""
    frames = moving_square(12)
    return write_clip(tmp_path_factory.mktemp("clip") / "a square.mp4", frames)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "first.png", folder / "second.png"]
    for path, frame in zip(paths, moving_square(2), strict=True):
        Image.fromarray(frame).save(path)
    return paths


class Visit:
    """A page that is watched: its console, its faults, and whom it asks."""

    def __init__(self, page: "Page", address: str) -> None:
        self.page, self.address = page, address
        self.expected: set[int] = set()
        """Statuses of 400 or more that belong to the test."""
        self.asked: list[tuple[str, str]] = []
        self.faults: list[str] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", lambda request: self.asked.append((request.method, request.url)))

    def _hear(self, message: Any) -> None:
        status = re.search(r"responded with a status of (\d+)", message.text)
        if message.type in ("error", "warning") and (
            status is None or int(status[1]) not in self.expected
        ):
            self.faults.append(message.text)

    def check(self) -> None:
        """No fault, and no request to another host."""
        assert self.faults == []
        hosts = {urlsplit(url).netloc for _, url in self.asked if not url.startswith("data:")}
        assert hosts == {urlsplit(self.address).netloc}

    def posts(self) -> int:
        """How many queries were sent."""
        return sum(method == "POST" for method, _ in self.asked)

    def find(self, **fields: str) -> None:
        """Fill in fields, press the button, and wait for the answer."""
        for name, value in fields.items():
            self.page.fill(f"#{name}", value)
        self.page.click("#find")
        self.wait()

    def wait(self) -> None:
        """Until nothing is under way."""
        self.page.wait_for_selector("#results[aria-busy=false]")

    def until(self, condition: str) -> None:
        """Wait; playwright's own way evaluates text in the page, which its policy forbids."""
        for _ in range(1000):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(20)
        raise TimeoutError(condition)

    def ids(self) -> list[str]:
        """Products as shown, best first."""
        return self.page.locator(".card .attributes div:last-child dd").all_text_contents()

    def text(self, selector: str) -> str:
        """What an element says."""
        return self.page.locator(selector).inner_text()

    def heard(self, words: str) -> None:
        """Wait until a screen reader has been told something that holds these words."""
        sync_api.expect(self.page.locator("#spoken")).to_contain_text(words)


Open = Callable[..., Visit]


@pytest.fixture
def visit(browser: "Browser", service: str) -> Iterator[Open]:
    """Opens the page; `ready=False` does not wait for the service's facts. Checked at the test's end."""
    visits, contexts = [], []

    def open_page(
        at: str = "", *, address: str = service, ready: bool = True, **settings: Any
    ) -> Visit:
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        visits.append(Visit(page, address))
        page.goto(f"{address}/{at}")
        if ready:
            page.wait_for_selector("#columns button")
        return visits[-1]

    yield open_page
    for one in visits:
        one.check()
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def matcher(page_index: Path) -> Matcher:
    """What the page's answers are compared with."""
    return Matcher.load(page_index, device="cpu")


def test_a_video_with_a_title_finds_what_the_matcher_finds(
    visit: Open, clip: Path, matcher: Matcher
) -> None:
    one = visit()
    assert "13 products" in one.text("#facts")
    one.page.set_input_files("#files", clip)
    assert "a square.mp4" in one.text("#chosen")
    one.find(text="a NOVA mug", k="5")
    expected = matcher.match(video=clip, title="a NOVA mug", k=5)
    assert one.ids() == [match.product_id for match in expected]
    places = one.page.locator(".place").all_inner_texts()
    scores = [float(text.split()[-1].replace("−", "-")) for text in places]
    assert scores == pytest.approx([match.score for match in expected], abs=0.002)
    frames = one.page.locator("#asked .frames img")
    assert frames.count() == len(expected.frames) == 6
    assert frames.nth(1).get_attribute("alt") == "Frame 2 of 6"
    assert one.text("#asked q") == "a NOVA mug"
    assert re.fullmatch(
        r"decode [\d.,]+ · encode [\d.,]+ · search [\d.,]+ · [\d.,]+ ms in all", one.text("#timing")
    )
    one.heard("5 matches. First: ")
    assert urlsplit(one.page.url).fragment == "text=a+NOVA+mug"  # of the video not a word


def test_pictures_of_products_are_loaded_late_in_a_long_list(visit: Open) -> None:
    one = visit(viewport={"width": 700, "height": 500})
    one.find(text="a mug", k="13")
    images = one.page.locator(".photo img")
    assert one.page.locator(".why").count() == 0  # of words alone there is nothing to say
    assert images.count() == 12  # the product that was added has none
    assert images.first.get_attribute("loading") == "eager"
    assert images.last.get_attribute("loading") == "lazy"
    images.last.scroll_into_view_if_needed()
    one.until("[...document.querySelectorAll('.photo img')].at(-1).naturalWidth > 0")
    assert all(image.get_attribute("alt") for image in images.all())
    assert one.text(".photo.none") == "no picture"


def test_why_shows_what_each_frame_and_each_half_adds(
    visit: Open, clip: Path, matcher: Matcher
) -> None:
    one = visit()
    one.page.set_input_files("#files", clip)
    one.find(text="a NOVA mug", k="1")
    one.page.click(".why summary")
    one.page.wait_for_selector(".why li")
    bars = one.page.locator(".why li")
    assert bars.count() == 6
    frames = matcher.read(clip, [])
    product = matcher.match(video=clip, title="a NOVA mug", k=1)[0].product_id
    target = matcher.index.vectors([product])[0]

    def score(kept: list[np.ndarray], title: str | None) -> float:
        return float(matcher.embed(kept, title) @ target)

    whole = score(frames, "a NOVA mug")
    for place in range(6):
        loss = whole - score(frames[:place] + frames[place + 1 :], "a NOVA mug")
        shown = bars.nth(place).get_attribute("title")
        assert shown is not None
        assert shown.startswith(f"frame {place + 1}: ")
        assert float(shown.split()[-1].replace("−", "-")) == pytest.approx(loss, abs=0.004)
    words = one.text(".why p")
    alone = re.search(r"Video alone (\S+), title alone (\S+)\.", words)
    assert alone
    numbers = [float(number.replace("−", "-")) for number in alone.groups()]
    assert numbers == pytest.approx([score(frames, None), score([], "a NOVA mug")], abs=0.004)


def test_pictures_can_be_added_and_taken_back(
    visit: Open, pictures: list[Path], matcher: Matcher
) -> None:
    one = visit()
    one.page.set_input_files("#files", pictures[0])
    one.page.set_input_files("#files", pictures)
    names = one.page.locator("#chosen .name")
    assert names.count() == 3
    one.page.get_by_role("button", name="Remove first.png").first.click()
    assert "first.png" in names.first.inner_text()
    one.find(k="4")
    expected = matcher.match(images=[str(path) for path in pictures], k=4)
    assert one.ids() == [match.product_id for match in expected]
    assert one.page.locator("#asked .frames img").count() == 2
    one.page.click("#clear")
    assert names.count() == 0
    one.find()
    assert one.text("#form-error") == "Choose a video or pictures, or type a title."


def test_words_and_filter_are_in_the_address(visit: Open, matcher: Matcher) -> None:
    one = visit()
    one.find(text="a mug", where="price > 5", k="3")
    expected = [match.product_id for match in matcher.match(text="a mug", where="price > 5", k=3)]
    assert one.ids() == expected
    one.find(text="a sock & more")
    first = one.ids()
    one.page.go_back()
    one.until("document.querySelector('q')?.textContent === 'a mug'")
    assert one.page.input_value("#where") == "price > 5"
    again = visit(urlsplit(one.page.url).fragment and "#" + urlsplit(one.page.url).fragment)
    again.page.wait_for_selector(".card")
    assert again.ids()[:3] == expected
    assert first != expected
    assert "price > 5" in again.text("#asked")


def test_columns_help_to_write_a_filter(visit: Open) -> None:
    one = visit()
    assert one.page.get_attribute("#where", "placeholder") == "price < 30 and category = '…'"
    assert "price number" in one.text("#columns")
    one.page.locator("#columns button", has_text="price").click()
    one.page.keyboard.type("< 0")
    assert one.page.input_value("#where") == "price < 0"
    one.find(text="a mug")
    assert one.text("#matches") == "No product meets the filter."
    one.heard("No matches.")


def test_a_bad_filter_is_explained_at_its_field(visit: Open) -> None:
    one = visit()
    one.expected = {422}
    one.find(text="a mug", where="prize < 3")
    assert one.text("#where-error") == 'There is no column "prize".'
    assert one.page.get_attribute("#where", "aria-invalid") == "true"
    assert one.page.evaluate("document.activeElement.id") == "where"
    assert one.text("#form-error") == one.text("#files-error") == ""
    one.heard("prize")
    one.find(where="")
    assert one.text("#where-error") == ""
    assert one.page.get_attribute("#where", "aria-invalid") is None


def test_a_number_of_matches_that_is_none_is_explained(visit: Open) -> None:
    one = visit()
    one.find(text="a mug", k="0")
    assert one.text("#k-error") == "A whole number from 1 to 100."
    assert one.posts() == 0


def test_files_that_will_not_do_are_explained_before_they_are_sent(
    visit: Open, clip: Path, tmp_path: Path
) -> None:
    large, empty = tmp_path / "large.mp4", tmp_path / "empty.mp4"
    large.write_bytes(bytes(3 << 19))
    empty.touch()
    one = visit()
    one.page.set_input_files("#files", empty)
    assert one.text("#files-error") == "empty.mp4 is empty."
    one.page.set_input_files("#files", large)
    assert one.text("#files-error") == "1.5 MB is too large; the service takes up to 1.0 MB."
    one.page.set_input_files("#files", [clip, large])
    assert one.text("#files-error").startswith("One video, or pictures")
    assert one.page.locator("#chosen li").count() == 0
    assert one.posts() == 0


def test_files_that_the_service_refuses_are_explained_at_the_field(
    visit: Open, clip: Path, tmp_path: Path
) -> None:
    large, text, cut = (tmp_path / name for name in ("large.mp4", "text.mp4", "cut.png"))
    large.write_bytes(clip.read_bytes() + bytes(3 << 19))
    text.write_text("these are words")
    cut.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    one = visit(ready=False)
    one.page.route("**/v1/info", lambda route: _larger(route))
    one.page.reload()
    one.page.wait_for_selector("#columns button")
    one.expected = {413, 415, 422}
    for path, words in ((large, "1 MiB|1 MB|bytes"), (text, "found"), (cut, "cut.png|image")):
        one.page.set_input_files("#files", path)
        one.find()
        assert re.search(words, one.text("#files-error")), one.text("#files-error")
        assert one.page.evaluate("document.activeElement.id") == "files"
        one.page.click("#clear")


def _larger(route: Any) -> None:
    """The service's facts, but for a limit that is not its own."""
    answer = route.fetch()
    facts = answer.json()
    facts["limits"]["max_bytes"] = 1 << 30
    route.fulfill(response=answer, json=facts)


def test_a_busy_service_says_when_to_come_again(visit: Open) -> None:
    one = visit()
    one.expected = {503}
    error = {"status": 503, "reason": "256 queries wait already", "request_id": "x"}
    one.page.route(
        "**/v1/match",
        lambda route: route.fulfill(
            status=503, headers={"Retry-After": "1"}, json={"error": error}
        ),
    )
    one.find(text="a mug")
    assert one.text("#form-error") == "256 queries wait already. Try again in 1 second."


def test_everything_can_be_done_by_keyboard(visit: Open, clip: Path) -> None:
    one = visit()
    page = one.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "files"
    ring = page.evaluate("getComputedStyle(document.querySelector('.drop')).outlineStyle")
    assert ring == "solid"
    choosers: list[Any] = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    for waited in range(1_000):  # A busy browser may miss the key; a person presses again.
        if choosers:
            break
        if waited % 250 == 0:
            page.keyboard.press("Enter")
        page.wait_for_timeout(20)
    choosers[0].set_files(clip)
    page.wait_for_selector("#chosen li")
    _tab_to(page, "text")
    page.keyboard.type("a mug")
    _tab_to(page, "where")
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    names = page.locator("#columns button")
    page.keyboard.press("ArrowLeft")  # from the first to the last
    last = names.count() - 1
    assert page.evaluate("document.activeElement.textContent") == names.nth(last).text_content()
    _tab_to(page, "k")
    page.keyboard.press("Enter")
    page.wait_for_selector(".card")
    one.heard("12 matches")
    while page.evaluate("document.activeElement.className") != "like":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#back:not([hidden])")
    one.until("document.activeElement.id === 'results-heading'")
    assert "matches like" in one.text("#results-heading")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert one.text("#results-heading") == "12 matches"


def _tab_to(page: "Page", id_: str) -> None:
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == id_:
            return
    raise AssertionError(f"Tab does not come to #{id_}")


def test_escape_ends_what_is_under_way(visit: Open) -> None:
    one = visit(reduced_motion="reduce")
    one.page.route("**/v1/match", lambda route: None)  # an answer that never comes
    one.page.fill("#text", "a mug")
    one.page.keyboard.press("Enter")
    one.page.wait_for_selector("#cancel:not([hidden])")
    assert one.text("#stage") == "Matching"
    assert one.page.get_attribute("#results", "aria-busy") == "true"
    assert one.page.evaluate("getComputedStyle(bar).animationName") == "none"
    one.page.keyboard.press("Escape")
    one.wait()
    one.heard("Cancelled.")
    assert one.page.is_visible("#find")
    assert one.page.evaluate("document.activeElement.id") == "text"
    one.page.unroute("**/v1/match")
    one.find()
    assert len(one.ids()) == 12


def test_more_like_this_leaves_the_product_itself_out(visit: Open, matcher: Matcher) -> None:
    one = visit()
    one.find(text="a mug", k="4")
    before = one.ids()
    one.page.locator(".like").first.click()
    one.page.wait_for_selector("#back:not([hidden])")
    vector = matcher.index.vectors([before[0]])
    nearest = matcher.index.search(vector, 5).ids[0]
    assert one.ids() == [id_ for id_ in nearest if id_ != before[0]][:4]
    one.page.click("#back")
    assert one.ids() == before


def test_a_title_that_is_html_stays_text(visit: Open) -> None:
    one = visit()
    one.find(text="a mug", k="13", where=f"title = '{SCRIPT.replace(chr(39), chr(39) * 2)}'")
    assert one.text(".card h3") == SCRIPT
    one.page.click(".like")  # its title goes into the heading, too
    one.page.wait_for_selector("#back:not([hidden])")
    assert SCRIPT in one.text("#results-heading")
    assert one.page.evaluate("window.broken") is None
    assert one.page.locator("main script, main img[onerror]").count() == 0


def test_a_policy_forbids_what_the_page_does_not_need(visit: Open) -> None:
    one = visit()
    policy = one.page.request.get(one.address).headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";") if rule.strip())
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == "'self'"


def test_a_phone_scrolls_in_one_direction_and_shows_the_matches(visit: Open, clip: Path) -> None:
    one = visit(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    one.page.set_input_files("#files", clip)
    one.find(text="a mug with a rather long title " * 4)
    one.page.wait_for_selector(".card")
    one.page.locator(".why summary").first.tap()
    one.page.wait_for_selector(".why ol")
    assert one.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    top = one.page.evaluate("results.getBoundingClientRect().top")
    assert -5 <= top <= 60
    for name in ("#find", "#clear", ".like"):
        box = one.page.locator(name).first.bounding_box()
        assert box
        assert box["height"] >= 36


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(visit: Open, scheme: str) -> None:
    one = visit(color_scheme=scheme)
    one.expected = {422}
    one.find(text="a mug")
    one.find(where="nothing")
    ground = one.page.evaluate("getComputedStyle(document.body).backgroundColor")
    lights = [int(part) for part in re.findall(r"\d+", ground)[:3]]
    assert (sum(lights) > 600) == (scheme == "light")
    for selector in ("#facts", ".hint", "#where-error", "#columns span", ".card h3", ".place"):
        assert one.page.evaluate(CONTRAST, selector) >= 4.5, selector
    for selector in ("#find", ".drop", ".attributes dt", "#timing", ".like", "#clear"):
        assert one.page.evaluate(CONTRAST, selector) >= 4.5, selector


def test_every_field_and_button_has_a_name(visit: Open) -> None:
    one = visit()
    one.find(text="a mug", k="2")
    names = one.page.locator("input:visible, button:visible, #files")
    for element in names.all():
        name = element.evaluate(
            "e => e.getAttribute('aria-label') ?? (e.labels?.length ? e.labels[0].textContent : "
            "e.textContent)"
        )
        assert name.strip(), element
    tree = one.page.locator("body").aria_snapshot()
    for words in ('heading "2 matches"', 'textbox "Filter"', 'spinbutton "Matches"'):
        assert words in tree, tree
    assert 'button "More like this: ' in tree


def test_a_file_can_be_dropped_anywhere(visit: Open) -> None:
    one = visit()
    one.page.evaluate(
        """() => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File(["x"], "dropped.png", { type: "image/png" }));
          for (const type of ["dragover", "drop"])
            results.dispatchEvent(
              new DragEvent(type, { bubbles: true, cancelable: true, dataTransfer }));
        }"""
    )
    assert "dropped.png" in one.text("#chosen")


def test_a_token_is_asked_for_and_kept_out_of_addresses(visit: Open, page_index: Path) -> None:
    with service_on(page_index, token=TOKEN) as served:
        one = visit(address=served.url, ready=False)
        one.expected = {401}
        one.page.wait_for_selector("#token", state="visible")
        assert one.text("#token-error") == "Enter the token to go on."
        one.page.fill("#token", "a wrong token")
        one.page.fill("#text", "a mug")
        one.page.keyboard.press("Enter")
        sync_api.expect(one.page.locator("#token-error")).to_have_text(
            "The service does not take this token."
        )
        one.page.fill("#token", TOKEN)
        one.page.keyboard.press("Enter")
        one.page.wait_for_selector(".card")
        assert one.page.is_hidden("#token")
        assert "13 products" in one.text("#facts")
        one.until("document.querySelector('.photo img').naturalWidth > 0")
        assert all(TOKEN not in url for _, url in one.asked)
        one.page.reload()
        one.page.wait_for_selector("#columns button")  # the tab remembers it
        one.page.close()
