"""The search page in a real browser against a real server, the way a person uses it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import serving
from lookalike.api_client import ApiClient
from lookalike.api_client.queries import QueryPart
from tests.unit.serving.small_index import NUM_PICTURES, SmallIndex, draw, make_small_index

pytest.importorskip("selenium", reason="needs selenium: install lookalike with the extra [dev]")
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from tests.end_to_end.chromium_page import DESKTOP, IN_CHROMIUM, PHONE, Page
from tests.end_to_end.server_process import new_key, running_server

PAGE_FOLDER = Path(serving.__file__).parent / "page"

pytestmark = IN_CHROMIUM


@pytest.fixture(scope="module")
def small_index(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    return make_small_index(tmp_path_factory.mktemp("searched"))


@pytest.fixture(scope="module")
def two_things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disc on the left and a square on the right, which only a region tells apart: 192 x 96 pixels."""
    picture = Image.new("RGB", (192, 96), "white")
    picture.paste(draw("disc", "teal"), (0, 0))
    picture.paste(draw("square", "tomato"), (96, 0))
    path = tmp_path_factory.mktemp("pictures") / "two_things.png"
    picture.save(path)
    return path


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory, small_index: SmallIndex) -> Iterator[str]:
    with running_server(tmp_path_factory.mktemp("server"), small_index.index, allows_writes=True) as url:
        yield url


@pytest.fixture
def page(browser: webdriver.Chrome, server_url: str) -> Iterator[Page]:
    page = Page(browser, server_url)
    page.resize(DESKTOP)
    page.open()
    yield page
    page.require_good_behaviour()


def test_all_its_files_are_small_preloaded_and_name_no_other_server() -> None:
    names = {file.name for file in PAGE_FOLDER.iterdir()}
    html = (PAGE_FOLDER / "index.html").read_text()
    assert set(re.findall(r'"page/([^"]+)"', html)) == names - {"index.html"}
    for name in names:
        text = (PAGE_FOLDER / name).read_text()
        assert len(text.splitlines()) < 500
        assert not re.search(r"https?://", text.replace("http://www.w3.org/2000/svg", ""))


def test_it_begins_with_random_pictures_to_start_from(page: Page) -> None:
    assert page.one("h2").text == "Or start from one of these"
    first = page.found_ids()
    assert sorted(first) == list(range(NUM_PICTURES))
    assert page.one("#num-pictures").text == f"{NUM_PICTURES} pictures"
    page.wait_for(lambda: page.run("return performance.getEntriesByName(new URL('v1/indexes', location)).length"))
    assert not page.one("#versus").is_displayed()  # There is no other version.
    page.act("#shuffle")
    assert page.found_ids() != first


def test_an_uploaded_picture_is_shown_with_its_nearest_ones(page: Page, small_index: SmallIndex) -> None:
    page.upload(small_index.pictures / "ring" / "teal.png")
    assert page.one("h2").text == "Nearest pictures"
    assert page.one("#query-picture").is_displayed()
    assert page.one("#query-name").text == "Your picture\nteal.png"
    first = page.all(".card")[0]
    assert first.get_attribute("aria-label") == "ring, similarity 1.00. Search by this picture"
    assert page.texts(".label")[0] == "ring"
    assert page.texts(".value")[0] == "1.00"
    assert len(page.found_ids()) == NUM_PICTURES
    widths = [bar.size["width"] for bar in page.all(".fill")]
    assert widths == sorted(widths, reverse=True)
    assert page.texts("#timings dt") == ["decode", "encode", "search", "metadata", "queue", "total"]
    assert all("size=thumbnail" in str(image.get_attribute("src")) for image in page.all(".tile img"))
    assert {image.get_attribute("loading") for image in page.all(".tile img")} == {"lazy"}


def test_a_card_searches_by_its_picture_and_the_history_leads_back_and_forth(
    page: Page, small_index: SmallIndex
) -> None:
    page.upload(small_index.pictures / "disc" / "gold.jpg")
    by_upload = page.found_ids()
    page.act(".card")
    by_item = page.found_ids()
    assert page.browser.title == "disc · Lookalike"
    assert page.browser.current_url.endswith(f"?id={by_upload[0]}")
    assert by_upload[0] not in by_item
    assert page.all(".card.same")
    assert page.focused() == "heading"
    page.browser.back()
    page.wait_for_query("Your picture")
    assert page.found_ids() == by_upload
    page.browser.forward()
    page.wait_for_query("disc")
    assert page.found_ids() == by_item
    page.browser.refresh()
    page.wait_for_query("disc")
    assert page.found_ids() == by_item


def test_the_keyboard_is_enough(page: Page, small_index: SmallIndex) -> None:
    page.press("/")
    assert page.focused() == "picker"
    assert page.run("return getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"
    page.upload(small_index.pictures / "square" / "teal.png")
    page.press(Keys.TAB)
    found = page.found_ids()
    assert page.focused("data-id") == str(found[0])
    page.press(Keys.ARROW_RIGHT)
    assert page.focused("data-id") == str(found[1])
    page.press(Keys.ARROW_DOWN, Keys.ARROW_UP, Keys.HOME)
    assert page.focused("data-id") == str(found[0])
    page.press(Keys.TAB)
    assert page.focused("aria-label") == "More like square"
    page.press_with_shift(Keys.TAB)
    page.press(Keys.ENTER)
    page.wait_for_query("square")
    assert page.texts("#announcement")[0].startswith("Nearest pictures: ")
    found = page.found_ids()
    page.one(".skip").send_keys(Keys.ENTER)
    page.wait_until_settled()
    assert page.found_ids() == found
    assert page.focused() == "heading"


def test_all_that_can_be_operated_has_a_name(page: Page, small_index: SmallIndex) -> None:
    page.open("?id=3&unlike=5")
    page.run("document.getElementById('filters').open = true")
    page.one("#crop-start").click()
    page.wait_for(lambda: page.one("#crop-apply").is_displayed())
    controls = page.names_of_controls()
    assert {"button", "combobox", "slider", "link"} <= {role for role, _ in controls}
    assert not [role for role, name in controls if not name.strip()]


def test_a_fragment_in_the_address_leaves_what_was_found(page: Page) -> None:
    page.open("?id=3")
    found = page.found_ids()
    script = (
        "const done = arguments[0]; addEventListener('hashchange', () => setTimeout(done)); location.hash = 'results'"
    )
    page.browser.execute_async_script(script)
    page.wait_until_settled()
    assert page.found_ids() == found


def test_pictures_can_be_dropped_and_pasted(page: Page) -> None:
    script = """
        const [event, name] = arguments;
        const blob = await (await fetch(document.querySelector(".card img").src)).blob();
        const transfer = new DataTransfer();
        transfer.items.add(new File([blob], name, { type: blob.type }));
        document.body.dispatchEvent(
          event === "paste"
            ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true })
            : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }),
        );
    """
    for event in ("drop", "paste"):
        page.open()
        page.run(script, event, f"{event}.png")
        page.wait_for_query("Your picture")
        assert page.one("#query-name small").text == f"{event}.png"
        assert float(page.texts(".value")[0]) > 0.95


def test_a_phone_takes_a_photo_in_place_of_a_file(page: Page, small_index: SmallIndex) -> None:
    camera = page.one("#camera")
    assert camera.get_attribute("capture") == "environment"
    camera.send_keys(str(small_index.pictures / "disc" / "teal.png"))
    page.wait_for_query("Your picture")
    assert page.texts(".value")[0] == "1.00"


def test_a_region_drawn_with_the_mouse_is_what_is_searched_by(page: Page, two_things: Path) -> None:
    page.upload(two_things)
    of_all = page.texts(".value")
    page.one("#crop-start").click()
    # The picture is twice as wide as high, so it lies between a quarter and three quarters of the area's height; the
    # box covers all but a margin, and what is drawn outside of it is another one.
    page.drag((0.5, 0.265), (0.9, 0.74))
    edge = page.one(".edge.right")
    webdriver.ActionChains(page.browser, duration=50).click_and_hold(edge).move_by_offset(60, 0).release().perform()
    page.drag((0.8, 0.5), (0.75, 0.5))  # the box as a whole, back and to the end again
    page.drag((0.75, 0.5), (0.98, 0.5))
    page.act("#crop-apply")
    region = page.state()["parts"][0]["roi"]
    assert region == pytest.approx([96, 3, 192, 94], abs=3)
    assert page.texts(".label")[0] == "square"
    assert page.texts("#query-name small") == ["two_things.png, a region of it"]
    assert page.one(".crop.fixed .crop-box").is_displayed()
    with ApiClient(page.url) as client:
        expected = client.search(two_things.read_bytes(), roi=region, k=NUM_PICTURES)
    assert page.found_ids() == [hit.id for hit in expected.hits]
    page.act("#crop-clear")
    assert page.texts(".value") == of_all


def test_a_region_can_be_chosen_with_the_keyboard_alone(page: Page, two_things: Path) -> None:
    page.upload(two_things)
    page.run("document.getElementById('crop-start').focus()")
    page.press(Keys.ENTER)
    assert page.focused("class") == "crop-box"
    page.press(Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    page.press(Keys.TAB)
    assert page.focused("aria-label") == "Left edge"
    assert page.focused("aria-valuetext") == "17 of 192 pixels"  # 10% less 1%
    page.press_with_shift(*[Keys.ARROW_RIGHT] * 4)
    page.press(Keys.TAB, Keys.ARROW_UP, Keys.ENTER)
    page.wait_for_query("Your picture")
    page.wait_for(lambda: page.state()["parts"][0].get("roi"))
    page.wait_until_settled()
    # 9% + 4 x 10% of 192; 10% + 1% - 1% of 96; 89% of 192; 91% of 96
    assert page.state()["parts"][0]["roi"] == [94, 10, 171, 87]
    assert page.texts(".label")[0] == "square"
    assert page.focused() == "heading"


def test_a_region_of_a_gallery_picture_is_drawn_with_a_finger_on_a_phone(page: Page) -> None:
    page.resize(PHONE)
    page.open("?id=3")
    page.one("#crop-start").click()
    page.wait_for(lambda: page.one("#crop-apply").is_displayed())
    page.swipe((0.02, 0.02), (0.5, 0.6))
    page.act("#crop-apply")
    assert page.state()["parts"][0]["roi"] == pytest.approx([2, 2, 48, 58], abs=2)
    page.browser.refresh()
    page.wait_until_settled()
    page.resize(DESKTOP)


def test_conditions_narrow_what_is_found(page: Page) -> None:
    page.open("?id=3")
    page.one("#filters summary").click()
    page.one("[name=value]").send_keys("disc")
    page.act("#filter-form [type=submit]")
    assert set(page.texts(".label")) == {"disc"}
    page.one("[name=value]").send_keys("ring", Keys.ENTER)
    page.wait_for(lambda: len(page.state()["conditions"][0]["values"]) == 2)
    page.wait_until_settled()
    assert page.one("#conditions button").get_attribute("aria-label") == "Remove: class name is disc or ring"
    assert set(page.texts(".label")) == {"disc", "ring"}
    address = page.browser.current_url
    page.act("#home")
    page.browser.get(address)
    page.wait_for_heading("Nearest pictures")
    assert set(page.texts(".label")) == {"disc", "ring"}
    page.one("[name=column]").send_keys("width")
    page.one("[name=test]").send_keys("from")
    page.one("[name=value]").send_keys("1000", Keys.ENTER)
    page.wait_for_heading("Nothing found")
    assert page.one("#summary").text == "No other picture fits the conditions."
    page.act("#conditions li:nth-child(2) button")
    page.act("#conditions button")
    assert len(set(page.texts(".label"))) > 2


def test_conditions_alone_list_the_pictures_that_fit(page: Page) -> None:
    page.open('?filter=[{"column":"class_name","test":"is not","values":["disc"]}]')
    assert page.one("#heading").text == "Pictures that fit"
    assert page.found_ids() == sorted(page.found_ids())
    assert set(page.texts(".label")) == {"square", "ring", "triangle"}
    page.open('?filter=[{"column":"class_name","test":"is","values":["none"]}]')
    assert page.one("#heading").text == "No picture fits"


@pytest.mark.parametrize("filter", ["[1]", "{", '[{"column":"a","test":"is","values":"b"}]', "<script>", "[null]"])
def test_a_foreign_address_is_no_filter(page: Page, filter: str) -> None:
    page.open(f"?filter={filter}")
    assert len(page.found_ids()) == NUM_PICTURES


def test_a_refused_condition_says_why_and_how_to_go_on(page: Page) -> None:
    page.open('?id=3&filter=[{"column":"width","test":"between","values":["wide",null]}]')
    alert = page.one("[role=alert]")
    assert alert.is_displayed()
    assert page.texts("#problem .problem-fix") == [
        "Correct the condition; /v1/info names the columns that the metadata have."
    ]
    page.act("#conditions button")
    assert not alert.is_displayed()
    assert page.found_ids()


def test_results_come_in_pages(page: Page) -> None:
    page.open("?id=3")
    assert not page.one("#pages").is_displayed()
    in_one = page.found_ids()
    assert len(in_one) == NUM_PICTURES - 1
    page.one("#count").send_keys("12")
    page.wait_for(lambda: len(page.found_ids()) == 12)
    assert page.found_ids() == in_one[:12]
    page.act("#next")
    assert page.found_ids() == in_one[12:]
    assert page.one("#page-number").text == "Page 2"
    assert page.texts("#announcement")[0].endswith("Page 2.")
    assert not page.one("#next").is_enabled()
    assert page.focused() == "heading"
    page.act("#previous")
    assert page.found_ids() == in_one[:12]


def test_pictures_can_be_wanted_and_unwanted_beside_the_query(page: Page) -> None:
    page.open("?id=3")
    wanted, unwanted = page.found_ids()[4], page.found_ids()[1]
    page.act(f"li:has([data-id='{wanted}']) .more")
    page.act(f"li:has([data-id='{unwanted}']) .less")
    assert page.browser.current_url.endswith(f"?id=3&id={wanted}&unlike={unwanted}")
    parts = [QueryPart(id=3), QueryPart(id=wanted), QueryPart(id=unwanted, weight=-0.5)]
    with ApiClient(page.url) as client:
        expected = client.search(parts=parts, k=NUM_PICTURES)
    assert page.found_ids() == [hit.id for hit in expected.hits]
    page.act("#examples li:last-child button")
    page.act("#examples li:last-child button")
    assert page.browser.current_url.endswith("?id=3")


def test_a_picture_is_added_found_and_deleted_again(page: Page, two_things: Path) -> None:
    page.upload(two_things)
    page.one("#add").click()
    page.one("#add-fields [name=class_name]").send_keys("pair")
    page.one("#add-fields [name=key]").send_keys("added by hand")
    page.act("#add-dialog [type=submit]")
    assert page.browser.title == "pair · Lookalike"
    [added] = [part["id"] for part in page.state()["parts"]]
    assert page.texts("#announcement")[0].startswith(f"Added as picture {added}.")
    assert page.one("#num-pictures").text == f"{NUM_PICTURES + 1} pictures"
    page.upload(two_things)
    assert page.found_ids()[0] == added
    assert page.run("return document.querySelector('.tile img').naturalWidth") == 192

    delete = page.one(f"li:has([data-id='{added}']) .delete")
    page.run("arguments[0].click()", delete)  # seen once the mouse is over it
    page.press(Keys.ESCAPE)
    page.wait_for(lambda: not page.one("#delete-dialog").is_displayed())
    page.run("arguments[0].click()", delete)
    page.one("#delete-dialog .cancel").click()
    assert page.found_ids()[0] == added
    # A browser tells of a closed dialog a while after: here, when the next one is open already.
    page.run(
        "arguments[0].click(); document.querySelector('#delete-dialog .cancel').click(); arguments[0].click()", delete
    )
    assert page.focused("class") == "cancel"
    assert "pair" in page.one("#delete-dialog").text
    page.one("#delete-dialog .danger").click()
    page.wait_for(lambda: added not in page.found_ids())
    page.wait_until_settled()
    assert page.texts("#announcement")[0].startswith("Deleted: pair.")
    assert page.one("#num-pictures").text == f"{NUM_PICTURES} pictures"


@pytest.mark.parametrize(
    ("control", "asks"), [("li:nth-child(5) .card", "v1/search"), ("#random", "sample=1"), ("#crop-start", "/image")]
)
def test_a_late_answer_leaves_a_newer_search_alone(page: Page, control: str, asks: str) -> None:
    page.open("?id=3")
    page.hold_answers(asks)
    page.one(control).click()
    page.wait_for_held_answers()
    page.act("li:nth-child(2) .card")
    address, found = page.browser.current_url, page.found_ids()
    picture = page.one("#query-picture").get_attribute("src")
    page.release_answers()
    assert page.browser.current_url == address
    assert page.found_ids() == found
    assert page.one("#query-picture").get_attribute("src") == picture
    assert not page.one("#crop").is_displayed()
    assert not page.one("#problem").is_displayed()


def test_a_picture_that_is_added_late_leaves_a_newer_search_alone(page: Page, two_things: Path) -> None:
    page.upload(two_things)
    page.hold_answers("v1/items [object FormData]")
    page.one("#add").click()
    page.one("#add-dialog [type=submit]").click()
    page.wait_for_held_answers()
    page.act(".card")
    address = page.browser.current_url
    page.release_answers()
    page.wait_for(lambda: page.texts("#announcement")[0].startswith("Added as picture "))
    assert page.browser.current_url == address
    page.wait_for(lambda: page.one("#num-pictures").text == f"{NUM_PICTURES + 1} pictures")
    with ApiClient(page.url) as client:
        client.delete(int(page.texts("#announcement")[0].split()[3].rstrip(".")))


def test_a_refused_picture_says_why_and_the_next_one_works(page: Page, small_index: SmallIndex, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    page.upload(tmp_path / "notes.png")
    alert = page.one("[role=alert]")
    assert alert.is_displayed()
    assert "Send a picture, such as a JPEG" in alert.text
    assert "Request " in alert.text
    assert not page.one("#retry").is_displayed()
    assert not page.all(".card")
    page.upload(small_index.pictures / "disc" / "teal.png")
    page.wait_for(lambda: page.all(".card"))
    assert not alert.is_displayed()


def test_a_server_that_is_gone_is_named_and_can_be_tried_again(page: Page) -> None:
    network = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.browser.execute_cdp_cmd("Network.enable", {})
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", network)
    page.one("#random").click()
    page.wait_for(lambda: page.one("#problem").is_displayed())
    assert "could not be reached" in page.one("[role=alert]").text
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**network, "offline": False})
    page.one("#retry").click()
    page.wait_for_heading("Or start from one of these")
    page.browser.get_log("browser")  # the browser complains of being offline


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(
    browser: webdriver.Chrome, small_index: SmallIndex, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    key = new_key(keys)
    with running_server(tmp_path, small_index.index, keys=str(keys)) as url:
        page = Page(browser, url)
        page.resize(DESKTOP)
        page.open()
        for wrong in ("wrong", "schlüssel"):
            page.one("#key").send_keys(wrong, Keys.ENTER)
            page.wait_for(lambda: page.one("#key").get_attribute("value") == "")
            page.wait_for(lambda: page.one("#key-form").is_displayed())
            assert not page.all(".card")
        page.one("#key").send_keys(key, Keys.ENTER)
        page.wait_for_heading("Or start from one of these")
        assert sorted(page.found_ids()) == list(range(NUM_PICTURES))
        page.wait_for(lambda: page.run("return document.querySelector('.tile img').naturalWidth > 0"))
        assert key in page.run("return Object.values(sessionStorage)")
        assert page.run("return [localStorage.length, document.cookie]") == [0, ""]
        assert not any(button.is_displayed() for button in page.all(".delete"))
        page.one("#forget-key").click()
        page.wait_for(lambda: page.one("#key-form").is_displayed())
        assert not page.all(".card")
        assert page.run("return sessionStorage.length") == 0
        page.require_good_behaviour()


def test_an_id_of_64_bits_stays_exact(page: Page) -> None:
    page.open("?id=9223372036854775806")
    assert "9223372036854775806" in page.one("[role=alert]").text
    script = "return JSON.stringify((await import('/page/api.js')).numberOf('9223372036854775806'))"
    assert page.run(script) == "9223372036854775806"


def test_a_server_without_an_encoder_asks_for_no_picture(
    browser: webdriver.Chrome, small_index: SmallIndex, tmp_path: Path
) -> None:
    with running_server(tmp_path, small_index.index, engine={"vectors_only": True}) as url:
        page = Page(browser, url)
        page.open("?id=3")
        assert len(page.found_ids()) == NUM_PICTURES - 1
        for control in ("#choose", "#drop", "#crop-start", "#add"):
            assert not page.one(control).is_displayed()
        page.require_good_behaviour()


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_screen(page: Page, tmp_path: Path, size: tuple[int, int], scheme: str) -> None:
    page.resize(size)
    page.browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    page.open('?id=3&unlike=5&filter=[{"column":"class_name","test":"is","values":["disc","ring"]}]')
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")
    paper = re.findall(r"\d+", page.run("return getComputedStyle(document.body).backgroundColor"))
    assert (max(map(int, paper)) < 64) == (scheme == "dark")
    screenshot = tmp_path / "search_page.png"
    assert page.browser.save_screenshot(str(screenshot))
    assert screenshot.stat().st_size > 10_000
