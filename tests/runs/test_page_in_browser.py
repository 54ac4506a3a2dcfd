"""Chromium reads the page of a run as a person would."""

import json
import shutil

import pytest
from run_folders import HOSTILE, rollout, write_run

from dynamo_lightning.runs.page import write_page

selenium = pytest.importorskip("selenium", reason="needs selenium, of the extra `test`")
pytest.importorskip("plotly", reason="needs the extra `report`")
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver: apt-get install chromium chromium-driver"
)
NUM_ROLLOUTS = 50_000
TRIPWIRE = {"iteration": 7, "tripwire": "entropy_collapse", "level": "warning", "message": "Entropy fell & fell."}


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens the page of some runs in a window of this width; fails if the console has an error."""

    def run(*folders, width=1440, dark=False):
        if (folders, width, dark) == getattr(browser, "visited", None):  # the page as it was opened
            browser.execute_script(
                "document.getElementById('group').close();document.getElementById('filters').reset()"
            )
            return browser
        page = write_page(list(map(str, folders)), str(tmp_path / "report.html"))
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.get(page.as_uri())
        browser.visited = (folders, width, dark)
        return browser

    yield run
    assert browser.get_log("browser") == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run", tripwires=[TRIPWIRE])


def test_every_plot_has_data_and_marks_of_warnings(visit, folder):
    browser = visit(folder)
    plots = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => [p.id, p.data.length && p.data.every(t => t.x.length),"
        "p.querySelectorAll('.main-svg').length, p.layout.annotations.length, p.layout.xaxis.title.text])"
    )
    assert len(plots) == 19
    for name, has_data, drawn, marks, x_title in plots:
        assert has_data and drawn, name
        assert marks == (x_title == "RL iteration"), name
    assert "warning, iteration 7: Entropy fell & fell." in browser.find_element("id", "main").text


def test_nothing_is_loaded_from_anywhere(visit, folder):
    assert visit(folder).execute_script("return performance.getEntriesByType('resource').length") == 0


def test_a_point_of_the_plot_opens_its_group_with_colored_tokens(visit, folder):
    from selenium.webdriver.support.ui import WebDriverWait

    browser = visit(folder)
    # The slider stands at iteration 31, the last with responses; prompt 2 is the second of them.
    center = browser.execute_script(
        "const plot = document.getElementById('plot-groups-0'); plot.scrollIntoView({block: 'center'});"
        "const points = [...plot.querySelectorAll('.scatterlayer .trace:last-child .point')];"
        "const box = points[1].getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]"
    )
    x, y = map(round, center)
    dialog = browser.find_element("id", "group")

    def click(_):
        """Click, until the plot has seen the pointer come: a click before that is none."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, **button})
        return dialog.is_displayed()

    WebDriverWait(browser, 20).until(click)
    assert browser.find_element("id", "group-title").text == "4 rollouts of one prompt, iteration 31"
    assert browser.find_element("id", "group-prompt").text == "Problem 2?"
    colors = "return [...document.querySelectorAll('.response span')].map(s => s.style.backgroundColor)"
    by_advantage = browser.execute_script(colors)
    assert len(by_advantage) == 24 and by_advantage[0] != by_advantage[6]  # rewards 0 and 1
    choose = (
        "const s = document.getElementById('token-color'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))"
    )
    for name, different in (("entropy", True), ("beta_comp", True), ("", False)):
        browser.execute_script(choose, name)
        found = browser.execute_script(colors)
        assert (found[0] != found[5]) == different and found[:6] == found[6:12]
    browser.find_element("id", "group-close").click()
    assert not dialog.is_displayed()


def test_a_prompt_id_of_63_bits_opens_its_own_group(visit, folder):
    browser = visit(folder)
    browser.execute_script("document.querySelector('.groups button').click()")
    assert f"prompt {2**62 + 1}," in browser.find_element("id", "group-facts").text


def test_filters_leave_what_fits(visit, folder):
    browser = visit(folder)

    def found(**values):
        browser.execute_script(
            "document.getElementById('filters').reset();"
            "for (const [k, v] of Object.entries(arguments[0])) document.getElementById('filter-' + k).value = v;"
            "document.getElementById('filter-text').dispatchEvent(new Event('input'))",
            values,
        )
        return int(browser.find_element("id", "filter-status").text.split()[0])

    assert found() == 32
    assert found(source="algebra") == found(source="geometry") == 16
    assert found(**{"reward-low": "0.5"}) == found(**{"reward-high": "0.5"}) == 16
    assert found(**{"iteration-low": "11", "iteration-high": "21"}) == 16
    assert found(text="PROBLEM 2?") == 16 and found(text="\\boxed{3}") == 8 and found(text="nowhere") == 0
    assert found(text="problem 2?", **{"reward-low": "0.5"}) == 8


def test_a_point_of_a_curve_filters_its_iteration(visit, folder):
    browser = visit(folder)
    browser.execute_script("document.getElementById('plot-reward').emit('plotly_click', {points: [{x: 22}]})")
    assert browser.execute_script("return document.getElementById('filter-iteration-low').value") == "21"
    assert browser.find_element("id", "filter-status").text == "8 of 32 rollouts, of 2 groups"


def test_print_is_light_and_narrow_and_the_screen_comes_back(visit, folder):
    browser = visit(folder, dark=True)

    def first_plot():
        script = "const p = document.querySelector('.plot'); return [p._fullLayout.width, p._fullLayout.font.color]"
        return browser.execute_script(script)

    before = first_plot()
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    width, color = first_plot()
    assert width < 350 < before[0] and color == "#1b1f24" != before[1]
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert first_plot() == before


def test_text_of_a_run_stays_text(visit, tmp_path):
    hostile = dict(response=HOSTILE, prompt=HOSTILE, answer=HOSTILE, source=HOSTILE, tokens=[HOSTILE] * 6)
    rows = [rollout(1, 2, 0, **hostile), rollout(1, 2, 1, **hostile, state=HOSTILE)]
    tripwires = [{"iteration": 3, "tripwire": HOSTILE, "level": "error", "message": HOSTILE}]
    run = write_run(tmp_path / "<b>run", rollouts=rows, options=f"x: {json.dumps(HOSTILE)}\n", tripwires=tripwires)
    browser = visit(run)
    browser.execute_script("document.querySelector('.groups button').click()")
    assert browser.title.startswith("Report of ") and browser.find_elements("css selector", "main b, dialog b") == []
    script = (
        f"const hostile = JSON.parse({json.dumps(json.dumps(HOSTILE))});"
        "return [...document.querySelectorAll(arguments[0])].every(e => e.textContent === hostile)"
    )
    for place in ("#group-prompt", ".response span"):  # a driver cannot take half a surrogate pair as a result
        assert browser.execute_script(script, place), place


@pytest.mark.parametrize("width, dark", [(390, True), (1440, False)])
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_the_screen(visit, folder, tmp_path, width, dark):
    axe = pytest.importorskip("axe_core_python.selenium", reason="needs axe-core-python, of the extra `test`").Axe()
    other = write_run(tmp_path / "other", correct=(4, 4, 4, 4), options="x: 1\n")
    browser = visit(folder, other, width=width, dark=dark)
    browser.execute_script("document.querySelector('details').open = true")

    def serious(context):
        results = axe.run(browser, context, options={"resultTypes": ["violations"]})
        return [
            (violation["id"], violation["nodes"][0]["html"][:200])
            for violation in results["violations"]
            if violation["impact"] in ("serious", "critical")
        ]

    # Each plot is one image with a description for axe; its hundreds of drawn elements would take half a minute.
    assert serious({"include": [["html"]], "exclude": [[".svg-container"]]}) == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    browser.execute_script("document.querySelector('.groups button').click()")
    assert serious({"include": [["#group"]]}) == []


def test_a_keystroke_filters_50000_rollouts_in_200_milliseconds(visit, tmp_path):
    words = "therefore the sum of these two numbers is exactly as required and we conclude "
    rows = [
        rollout(i, p, s, response=f"{words * 5} {i} {p} {s}", tokens=None, token_values=None)
        for i in range(1, NUM_ROLLOUTS // 64 + 2)
        for p in range(8)
        for s in range(8)
    ][:NUM_ROLLOUTS]
    browser = visit(write_run(tmp_path / "run", rollouts=rows))
    field = browser.find_element("id", "filter-text")
    milliseconds = []
    for text in ("t", "h", "e", "r", "e", " 7 7 ", "\b", "2"):
        field.send_keys(text)
        status = browser.find_element("id", "filter-status")
        milliseconds.append(float(status.get_attribute("data-milliseconds")))
    assert f"of {NUM_ROLLOUTS} rollouts" in status.text
    print(f"milliseconds per keystroke over {NUM_ROLLOUTS} rollouts: {[round(value) for value in milliseconds]}")
    assert max(milliseconds) <= 200
