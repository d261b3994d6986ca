"""The dashboard in headless Chromium: what it shows, that it lives, and that it can be used by keyboard and by ear."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from dashboard_state import LABELS, NASTY, TITLE, Backend, backend, second_project
from real_label_studio import browser, wait

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

FOCUSABLE = "a[href], button, [tabindex='0'], summary, input, select"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with backend(tmp_path_factory.mktemp("dashboard")) as found:
        yield found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    with browser(tmp_path_factory.mktemp("chromium")) as context:
        context.set_default_timeout(30_000)
        yield context


class Watched:
    """A page, with what it asked for and what it complained about."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self._heard(message.type, message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def _heard(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)


@pytest.fixture
def watched(served: Backend, chromium: BrowserContext) -> Iterator[Watched]:
    """The project's page, with everything on it that comes from Label Studio."""
    page = chromium.new_page()
    page.add_init_script("delete AbortSignal.any")  # which browsers of 2023 lack
    watched = Watched(page)
    page.goto(served.url)
    page.get_by_role("heading", name="To label next").wait_for()
    page.locator(".shots li").first.wait_for()
    page.get_by_role("region", name="Work by round").wait_for()
    yield watched
    page.close()
    hosts = {urlsplit(url).netloc for url in watched.requests}
    assert hosts == {urlsplit(served.url).netloc}
    assert watched.complaints == []


def until(page: Page, condition: str) -> None:
    """Wait until a JavaScript expression holds; the page's policy forbids Playwright's own way."""
    wait(lambda: bool(page.evaluate(condition)), 30, condition)


def refresh(page: Page) -> None:
    """Have the page ask now, as when its tab is shown again."""
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def running_job(served: Backend, **progress: Any) -> int:
    """A training that runs, as its process would report it."""
    job = served.jobs.enqueue(served.key, "START_TRAINING")
    claimed = served.jobs.claim()
    assert claimed is not None
    assert claimed.id == job
    measured = {2: 0.2, 4: 0.5}
    curve = [{"epoch": epoch, "loss": 3 / epoch, "ap50": measured.get(epoch)} for epoch in range(1, 6)]
    report = {"epoch": 5, "seconds_left": 80.0, "curve": curve, **progress}
    served.jobs.report(job, progress=0.25, reason="training: epoch 5", **report)
    return job


def test_a_project_is_shown_with_its_versions_jobs_labels_and_next_tasks(watched: Watched, served: Backend) -> None:
    page = watched.page
    assert page.title() == f"{TITLE} · yolonas"
    assert page.get_by_role("heading", level=1).inner_text() == TITLE
    link = page.get_by_role("link", name="Open in Label Studio")
    assert link.get_attribute("href") == f"{served.studio.url}/projects/{served.project}/data"
    tiles = page.locator(".tiles").inner_text()
    assert "v4" in tiles
    assert "INT8 in OpenVINO" in tiles
    assert "0.836" in tiles
    assert "▲ +0.060 against v3" in tiles
    assert "of 14 tasks" in tiles
    assert "median while v4 served" in tiles
    versions = page.get_by_role("table", name="Versions, the newest first")
    rows = [row.inner_text() for row in versions.locator("tbody tr").all()]
    assert [row.split()[0] for row in rows] == ["v4", "v3", "v2", "v1", "v0"]
    assert "serves" in rows[0]
    assert "0.520" in rows[0]
    assert "not measured" in rows[2]
    assert page.get_by_role("img", name="Accuracy of 4 versions: AP50 from 0.550 to 0.836").count() == 1
    trainings = page.get_by_role("table", name="Earlier trainings").inner_text()
    assert "failed" in trainings
    assert "refused" in trainings
    assert "check that it runs" in trainings
    work = page.get_by_role("table", name="Work by round").locator("tbody tr")
    cells = [row.inner_text().split("\t") for row in work.all()]
    assert cells == [
        ["v3", "2", "58 %", "0", "0", "5", "0", "2.5", "28 s"],
        ["v4", "2", "92 %", "0", "0", "1", "0", "0.5", "20 s"],
    ]
    name = "Boxes left as predicted over 2 rounds: from 58 % to 92 %"
    chart = page.get_by_role("img", name=name)
    assert chart.locator(".end").text_content() == "92 %"
    labels = page.get_by_role("table", name="Which class of the model becomes which label")
    assert labels.locator("tbody tr").count() == len(LABELS)
    assert "not predicted Label some tasks with it" in labels.locator("tbody tr").last.inner_text()
    shots = page.locator(".shots li")
    assert shots.count() == 10  # of 14 tasks four are labelled
    scores = [float(text.split()[-1]) for text in shots.locator(".line .soft").all_inner_texts() if text]
    assert len(scores) == 9
    assert scores == sorted(scores)
    assert "not predicted yet" in shots.last.inner_text()
    assert shots.first.locator("rect:not(.under)").count() == 6
    assert {*shots.first.locator(".found bdi").all_inner_texts()} <= {*LABELS}
    assert shots.first.get_by_role("link").get_attribute("href").endswith(f"/data?task={served.tasks[-2]}")
    until(page, "performance.getEntriesByType('resource').filter(e => e.name.includes('thumb')).length >= 10")
    assert page.locator(".shot.gone").count() == 0


def test_a_picture_that_cannot_be_had_is_said_until_another_page_is_opened(watched: Watched, served: Backend) -> None:
    page = watched.page
    upcoming = page.request.get(f"{served.url}/api/projects/{served.key}/next").json()
    upcoming["tasks"][1] |= {"thumbnail": None, "boxes": [], "tracks": 2, "counts": {"RBC": 2}}
    page.route("**/next", lambda route: route.fulfill(json=upcoming))
    page.route(f"**/thumbnails/{served.tasks[-2]}", lambda route: route.abort())
    page.reload()
    shots = page.locator(".shots li")
    gone = page.locator(".shot.gone")
    gone.wait_for()
    for _ in range(2):
        page.evaluate("document.querySelector('.shots').setAttribute('data-mark', '')")
        refresh(page)
        until(page, "!document.querySelector('.shots[data-mark]')")  # drawn anew
        assert gone.count() == 1
    assert shots.first.locator(".gone").count() == 1
    assert shots.nth(1).locator(".shot.none").count() == 1
    assert shots.nth(1).locator(".found").inner_text() == "2 tracks: 2 × RBC"  # noqa: RUF001
    page.unroute_all()
    page.get_by_role("link", name="yolonas").click()
    page.get_by_role("heading", name="Projects", level=1).wait_for()
    with page.expect_response(f"**/thumbnails/{served.tasks[-2]}"):
        page.go_back()
    assert gone.count() == 0
    watched.complaints.clear()  # the browser tells of the picture by itself


def test_texts_of_others_are_text(watched: Watched) -> None:
    page = watched.page
    page.get_by_role("button", name="Details of v4").click()
    assert page.get_by_role("rowheader", name=NASTY).count() == 2  # among the labels, and the classes of the version
    page.get_by_role("link", name="Training 4").click()
    page.get_by_role("heading", name="Log").wait_for()
    assert NASTY in page.locator("pre").inner_text()
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img").count() == 0


def test_the_report_of_a_version_opens_and_runs_nothing(watched: Watched, chromium: BrowserContext) -> None:
    watched.page.get_by_role("button", name="Details of v3").click()
    with chromium.expect_page() as opened:
        watched.page.get_by_role("link", name="The training's report").click()
    report = opened.value
    report.get_by_role("heading", name="The report").wait_for()
    assert report.evaluate("window.hacked") is None
    report.close()


def test_a_running_job_lives_on_the_page(watched: Watched, served: Backend) -> None:
    page = watched.page
    job = running_job(served)
    refresh(page)
    try:
        card = page.get_by_role("article", name=f"Training {job}")
        card.wait_for()
        assert "epoch 5 · loss 0.600 · AP50 0.500 in epoch 4 · 80 s left" in card.inner_text()
        chart = card.get_by_role("img", name="AP50 over 5 epochs: from 0.200 to 0.500")
        assert chart.locator(".dot circle").count() == 2
        assert [text for text in chart.locator(".tick").all_text_contents() if "." not in text] == [*"12345"]
        cancel = card.get_by_role("button", name=f"Cancel training {job}")
        cancel.focus()
        node = cancel.element_handle()
        served.jobs.report(job, progress=0.75, reason="training: epoch 7")
        until(page, "document.querySelector('progress').value === 0.75")
        assert card.get_by_role("progressbar").get_attribute("aria-label") == f"Progress of training {job}"
        assert node is not None
        assert node.evaluate("node => node.isConnected && document.activeElement === node")
        status = page.get_by_role("status")
        assert status.inner_text() == f"Training {job} is running, 75 percent done"
        served.finish(job, "refused", "v4 goes on: it was better")
        card.wait_for(state="detached")
        assert f"Training {job} refused" in status.inner_text()
    finally:
        served.finish(job, "refused", "the test is over")


def test_cancelling_is_asked_back_and_works_by_keyboard(watched: Watched, served: Backend) -> None:
    page = watched.page
    job = running_job(served)
    refresh(page)
    try:
        cancel = page.get_by_role("button", name=f"Cancel training {job}")
        cancel.wait_for()
        cancel.focus()
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog", name=f"Cancel training {job}?")
        dialog.wait_for()
        assert page.evaluate("document.activeElement.textContent") == "Leave it as it is"
        page.keyboard.press("Escape")
        dialog.wait_for(state="hidden")
        assert not served.jobs.get(job).cancel
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == f"Cancel training {job}"
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.get_by_text("being cancelled").first.wait_for()  # in the card, and in the status
        assert served.jobs.get(job).cancel
        until(page, "document.activeElement.id === 'main'")  # the button is gone
    finally:
        served.finish(job, "cancelled", "the test is over")


def test_rolling_back_is_asked_back(watched: Watched, served: Backend) -> None:
    page = watched.page
    page.get_by_role("button", name="Serve v2").click()
    dialog = page.get_by_role("dialog", name="Have v2 serve?")
    assert "predicted again" in dialog.inner_text()
    dialog.get_by_role("button", name="Leave it as it is").click()
    assert served.registry.current().number == 4
    page.get_by_role("button", name="Serve v2").click()
    dialog.get_by_role("button", name="Serve v2").click()
    until(page, "document.querySelector('.tiles .value').textContent === 'v2'")
    assert served.registry.current().number == 2
    page.get_by_role("button", name="Serve v4").click()
    page.get_by_role("dialog").get_by_role("button", name="Serve v4").click()
    until(page, "document.querySelector('.tiles .value').textContent === 'v4'")


def test_a_pinned_version_and_its_candidates_are_shown(watched: Watched, served: Backend) -> None:
    page = watched.page
    served.registry.rollback(3)
    refresh(page)
    page.get_by_role("button", name="Pin v3").click()
    page.get_by_role("dialog", name="Pin v3?").get_by_role("button", name="Pin v3").click()
    page.get_by_text("serves, pinned").wait_for()
    assert served.registry.pinned()
    rows = page.get_by_role("table", name="Versions, the newest first").locator("tbody tr")
    assert "candidate" in rows.first.inner_text()
    page.get_by_role("button", name="Unpin v3").click()
    page.get_by_text("serves, pinned").wait_for(state="detached")
    assert not served.registry.pinned()
    served.registry.rollback(4)


def test_the_focus_stays_where_an_earlier_element_goes(watched: Watched) -> None:
    kept = watched.page.evaluate("""async () => {
        const { h, patch } = await import("./dashboard/dom.js");
        const item = (key) => h("p", { "data-key": key }, h("button", null, key));
        const list = (...keys) => h("div", null, keys.map(item));
        const shown = list("a", "b", "c");
        document.body.append(shown);
        shown.lastChild.firstChild.focus();
        patch(shown, list("b", "c"));
        const focused = document.activeElement.textContent;
        shown.remove();
        return focused;
    }""")
    assert kept == "c"


def test_what_a_button_could_not_do_is_said(watched: Watched, served: Backend) -> None:
    page = watched.page
    page.route("**/api/projects/*/train", lambda route: route.fulfill(status=503, json={"error": "the disk is full"}))
    page.get_by_role("button", name="Train now").click()
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "the disk is full" in alert.inner_text()
    alert.get_by_role("button", name="Dismiss").click()
    alert.wait_for(state="detached")
    watched.complaints.clear()  # the browser tells of a 503 by itself


def test_a_backend_that_is_away_is_said_and_found_again(watched: Watched) -> None:
    page = watched.page
    page.route("**/api/**", lambda route: route.abort())
    refresh(page)
    connection, status = page.locator("#connection"), page.get_by_role("status")
    connection.get_by_text("The backend does not answer; trying again").wait_for()
    assert status.inner_text() == "The backend does not answer; trying again"
    assert page.get_by_role("heading", level=1).inner_text() == TITLE  # what was known stays
    page.unroute("**/api/**")
    connection.get_by_text("Label Studio answers").wait_for()
    assert status.inner_text() == "The backend answers again"
    watched.complaints.clear()


def test_what_the_backend_or_a_proxy_answers_is_said(watched: Watched) -> None:
    page = watched.page
    connection = page.locator("#connection")
    page.route("**/api/projects", lambda route: route.fulfill(status=503, json={"error": "the disk is full"}))
    refresh(page)
    connection.get_by_text("The backend answers 503: the disk is full; trying again").wait_for()
    page.unroute_all()
    page.route("**/api/projects", lambda route: route.fulfill(status=502, body="<html>"))
    refresh(page)
    connection.get_by_text("The backend answers 502: Bad Gateway; trying again").wait_for()
    page.unroute_all()
    connection.get_by_text("Label Studio answers").wait_for()
    watched.complaints.clear()


def test_what_is_not_found_does_not_hide_other_pages(watched: Watched, served: Backend) -> None:
    page = watched.page
    for address in ("jobs/999", "jobs/x", "projects/%", "projects/9-000000"):
        page.goto(f"{served.url}/#/")
        page.get_by_role("heading", name="Projects", level=1).wait_for()
        page.goto(f"{served.url}/#/{address}")
        page.get_by_role("heading", name="Not found").wait_for()
    page.route("**/api/**", lambda route: route.abort())
    page.goto(f"{served.url}/#/projects/{served.key}")
    page.get_by_text("Loading …").wait_for()
    assert page.get_by_role("heading", name="Not found").count() == 0
    page.unroute_all()
    page.get_by_role("heading", name=TITLE, level=1).wait_for()
    watched.complaints.clear()


def test_everything_is_reached_by_the_tab_key_and_shows_where_it_is(watched: Watched) -> None:
    page = watched.page
    page.evaluate("document.activeElement.blur()")
    wanted = page.evaluate(f"[...document.querySelectorAll({FOCUSABLE!r})].filter(e => e.offsetParent !== null).length")
    seen = []
    for _ in range(wanted):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("""() => {
                const all = [...document.querySelectorAll("*")], style = getComputedStyle(document.activeElement);
                return [all.indexOf(document.activeElement), parseFloat(style.outlineWidth), style.outlineStyle];
            }""")
        )
    places = [place for place, _, _ in seen]
    assert places == sorted(set(places)), "in the order of the page, each once"
    assert all(width >= 2 and style == "solid" for _, width, style in seen)
    assert page.evaluate("document.querySelector('.skip').getAttribute('href')") == "#main"


def check_headings(page: Page) -> None:
    """One of the first level, and none leaves out a level."""
    shown = "[...document.querySelectorAll('h1,h2,h3,h4')].filter(e => e.offsetParent)"
    levels = [int(level) for level in page.evaluate(f"{shown}.map(e => e.tagName[1])")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_the_page_of_a_training_is_built_for_screen_readers_while_it_runs_and_after(
    watched: Watched, served: Backend
) -> None:
    page = watched.page
    job = running_job(served)
    try:
        page.goto(f"{served.url}/#/jobs/{job}")
        page.get_by_role("article", name=f"Training {job}").wait_for()
        page.get_by_role("img", name="Loss over 5 epochs: from 3.000 to 0.600").wait_for()
        check_headings(page)
        served.finish(job, "refused", "the test is over")
        page.get_by_role("article").wait_for(state="detached")
        page.get_by_role("img", name="Loss over 5 epochs: from 3.000 to 0.600").wait_for()
        check_headings(page)
    finally:
        served.finish(job, "refused", "the test is over")


def test_the_end_of_a_training_is_told_on_the_page_of_all_projects(watched: Watched, served: Backend) -> None:
    page = watched.page
    job = running_job(served)
    try:
        page.goto(f"{served.url}/#/")
        page.get_by_role("article", name=f"Training {job}").wait_for()
        served.finish(job, "refused", "the test is over")
        page.get_by_text("No training runs or waits.").wait_for()
        assert page.get_by_role("status").inner_text() == f"Training {job} refused"
    finally:
        served.finish(job, "refused", "the test is over")


def test_a_training_is_asked_for_by_keyboard(watched: Watched, served: Backend) -> None:
    page = watched.page
    page.get_by_role("button", name="Train now").focus()
    page.keyboard.press("Enter")
    page.get_by_role("article").get_by_text("waiting").wait_for()
    (job,) = served.jobs.find(states=("queued",))
    until(page, "document.activeElement.id === 'main'")  # the button is gone
    served.jobs.cancel(job.id)


def test_the_page_is_built_for_screen_readers(watched: Watched, chromium: BrowserContext) -> None:
    page = watched.page
    page.get_by_role("button", name="Details of v4").click()
    assert page.evaluate("document.documentElement.lang") == "en"
    for landmark in ("banner", "main"):
        assert page.get_by_role(landmark).count() == 1
    check_headings(page)
    tables = page.locator("table")
    for index in range(tables.count()):
        table = tables.nth(index)
        assert table.locator("> caption").inner_text()
        assert table.locator("> thead th:not([scope=col])").count() == 0
        rows = table.locator("> tbody > tr:not(.more)")
        assert rows.count() == rows.locator("> th[scope=row]").count()
    tree = chromium.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    named = (
        "button",
        "link",
        "img",
        "image",
        "table",
        "region",
        "progressbar",
        "heading",
        "columnheader",
        "dialog",
        "article",
    )
    nameless = [
        node["role"]["value"]
        for node in tree
        if not node.get("ignored")
        and node.get("role", {}).get("value") in named
        and not node.get("name", {}).get("value")
    ]
    assert nameless == []
    buttons = [node["name"]["value"] for node in tree if node.get("role", {}).get("value") == "button"]
    assert len(buttons) == len(set(buttons)), "each button says what it does, and to which version or training"


CONTRAST = """() => {
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return { r, g, b, a }; };
  const mix = (top, under, c) => top[c] * top.a + under[c] * (1 - top.a);
  const over = (top, under) => Object.fromEntries(["r", "g", "b"].map((c) => [c, mix(top, under, c)]));
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ({ r, g, b }) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.unshift(parse(getComputedStyle(e).backgroundColor));
    return layers.reduce((under, top) => over(top, under), { r: 255, g: 255, b: 255 });
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const unseen = !element.getClientRects().length || element.closest(".unseen, script, noscript");
    if (unseen || !walker.currentNode.data.trim()) continue;
    const style = getComputedStyle(element), under = ground(element);
    const ink = over(parse(element instanceof SVGElement ? style.fill : style.color), under);
    const [a, b] = [light(ink), light(under)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), walker.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_and_nothing_scrolls_sideways(watched: Watched, served: Backend, scheme: str) -> None:
    page = watched.page
    job = running_job(served)
    refresh(page)
    try:
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        page.get_by_role("article", name=f"Training {job}").wait_for()
        page.get_by_role("button", name="Details of v4").click()
        contrasts = page.evaluate(CONTRAST)
        assert len(contrasts) > 150
        assert [entry for entry in contrasts if entry[0] < 4.5] == []
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(16, 19, 24)"}[scheme]
        moving = (
            "[...document.querySelectorAll('*')].filter(e => getComputedStyle(e).transitionDuration !== '0s').length"
        )
        assert page.evaluate(moving) == 0
        for width in (390, 320, 768):
            page.set_viewport_size({"width": width, "height": 844})
            until(page, f"innerWidth === {width} && document.querySelector('.chart > svg').clientWidth <= {width}")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
    finally:
        served.finish(job, "refused", "the test is over")


def test_all_projects_are_listed(watched: Watched, served: Backend) -> None:
    page = watched.page
    page.get_by_role("link", name="yolonas").click()
    page.get_by_role("heading", name="Projects", level=1).wait_for()
    row = page.get_by_role("table", name="What serves in each project").locator("tbody tr")
    assert row.count() == 1
    assert row.inner_text().split("\t")[1:4] == ["v4", "0.836", "4 of 14"]
    page.get_by_role("link", name=TITLE).click()
    page.get_by_role("heading", name=TITLE, level=1).wait_for()
    page.goto(f"{served.url}/#/jobs/999")
    page.get_by_text("there is no job 999 here").wait_for()
    watched.complaints.clear()  # a 404 is told by the browser itself


def test_several_projects_are_named_at_the_top_and_their_trainings_listed(watched: Watched, served: Backend) -> None:
    page = watched.page
    with second_project(served, "Second") as project:
        job = served.jobs.enqueue(project.key, "START_TRAINING")
        page.goto(f"{served.url}/#/")
        card = page.get_by_role("article", name=f"Training {job}")
        card.get_by_role("link", name="Second").wait_for()  # its title, once Label Studio was asked
        assert "waiting" in card.inner_text()
        assert page.get_by_role("table", name="What serves in each project").locator("tbody tr").count() == 2
        names = page.get_by_role("navigation", name="Projects").get_by_role("link")
        assert names.all_inner_texts() == [TITLE, "Second"]
        check_headings(page)
        card.get_by_role("button", name=f"Cancel training {job}").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel the training").click()
        page.get_by_text("No training runs or waits.").wait_for()
        names.last.click()
        page.get_by_role("heading", name="Second", level=1).wait_for()
        assert names.last.get_attribute("aria-current") == "page"
        page.get_by_text("Every task is labelled or skipped.").wait_for()
        many = page.request.get(f"{served.url}/api/projects").json()
        many["projects"] += [many["projects"][1] | {"key": f"{number}-000000"} for number in range(3, 10)]
        page.route("**/api/projects", lambda route: route.fulfill(json=many))
        refresh(page)
        page.get_by_role("link", name="All 9 projects").click()
        page.get_by_role("heading", name="Projects", level=1).wait_for()
        assert names.all_inner_texts() == ["All 9 projects"]
        page.unroute_all()


def test_without_a_project_the_page_says_how_to_connect_one(watched: Watched, served: Backend) -> None:
    page = watched.page
    none = page.request.get(f"{served.url}/api/projects").json() | {"projects": [], "jobs": []}
    page.route("**/api/projects", lambda route: route.fulfill(json=none))
    page.goto(f"{served.url}/#/")
    page.get_by_text(f"yolonas-labelstudio connect --project ID --url {served.url}").wait_for()
    page.unroute_all()


def test_without_label_studio_the_page_says_what_is_missing(served: Backend, watched: Watched) -> None:
    page = watched.page
    with served.studio.lock:
        served.studio.webhooks, kept = {}, served.studio.webhooks
    try:
        served.forget_overview()
        page.reload()
        page.get_by_text("Label Studio sends no events here").wait_for()
        assert page.get_by_role("region", name="Needs attention").count() == 1
        served.studio.away = True
        served.forget_overview()
        page.reload()
        page.get_by_text("answered 503").first.wait_for()
        assert page.get_by_text("Not known while Label Studio does not answer.").count() == 2
        assert page.get_by_role("table", name="Versions, the newest first").count() == 1
    finally:
        served.studio.away = False
        served.studio.webhooks = kept
        served.forget_overview()
