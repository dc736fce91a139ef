"""The page in a real browser: what a person sees."""

import time
from pathlib import Path

import pytest
from tests.report.conftest import Browser, records

from pretrain.experiments.groups import groups_at
from pretrain.io import append_jsonl
from pretrain.report import write_report
from pretrain.runs import Run

pytestmark = pytest.mark.slow


@pytest.fixture
def run(make_run) -> Run:
    run = make_run()
    append_jsonl(run.events, {"step": 7, "event": "skipped", "text": "skipped step 7: <b>not finite</b>"})
    return run


PLOTS = ["loss", "bpb", "rate", "norm", "speed"]
LABELS = "return [...document.querySelectorAll('#plots figure')].map((each) => each.dataset.plot)"


def test_it_opens_without_a_complaint_or_a_request(run: Run, tmp_path: Path, browser: Browser):
    file = write_report([run], tmp_path / "page.html")
    browser.open(file)
    assert browser.run(LABELS) == PLOTS
    for plot in PLOTS:
        assert browser.drawn(plot) > 1000, plot
    assert "#0b62b0" in browser.colors("loss")  # the training curve
    assert "#b84a00" in browser.colors("loss")  # the held-out curve
    browser.shoot(tmp_path / "wide.png")
    assert browser.complaints() == []
    assert browser.requests() == [file.as_uri()]
    assert "Loss. training, smoothed: 5 at step 1" in browser.find("canvas").get_attribute("aria-label")
    assert browser.find("#events td:last-child").text == "skipped step 7: <b>not finite</b>"


def test_other_axes(run: Run, tmp_path: Path, browser: Browser):
    browser.open(write_report([run], tmp_path / "page.html"))
    flops = browser.run("return JSON.parse(document.getElementById('data').textContent).runs[0].flops_per_token")
    last = {"step": "40", "tokens": "10.24K", "time": "20 s", "flops": f"{256 * 40 * flops / 1e9:.3g}e9"}
    for axis, shown in last.items():
        browser.find(f"input[value={axis}]").click()
        name = {"tokens": "training tokens", "flops": "FLOPs"}.get(axis, axis)
        assert browser.legend("loss") == {
            name: shown,
            "training, each step": "2.075",
            "training, smoothed": "2.116",
            "held out": "2.275",
            "held out, lowest": "2.275",
        }
        assert browser.drawn("loss") > 1000
    browser.find("#logarithmic").click()
    assert browser.drawn("loss") > 1000
    assert browser.complaints() == []


def test_a_click_on_a_name_hides_its_curve(run: Run, tmp_path: Path, browser: Browser):
    browser.open(write_report([run], tmp_path / "page.html"))
    browser.find("figure[data-plot=bpb] .u-series:last-child th").click()
    browser.until("return document.querySelector('figure[data-plot=bpb] .u-off')")
    assert "#0b62b0" not in browser.colors("bpb")


def test_dragging_zooms_into_all_plots(run: Run, tmp_path: Path, browser: Browser):
    from selenium.webdriver import ActionChains

    browser.open(write_report([run], tmp_path / "page.html"))
    over = browser.find("figure[data-plot=loss] .u-over")
    before = browser.run(PIXELS, "speed")
    ActionChains(browser.driver).move_to_element_with_offset(over, 100, 0).click_and_hold().move_by_offset(
        150, 20
    ).release().perform()
    browser.until(f"return (function () {{ {PIXELS} }})('speed') !== arguments[0]", before)
    ActionChains(browser.driver).double_click(over).perform()
    browser.until(f"return (function () {{ {PIXELS} }})('speed') === arguments[0]", before)


PIXELS = "return document.querySelector(`figure[data-plot=${arguments[0]}] canvas`).toDataURL()"


def test_dark_and_back(run: Run, tmp_path: Path, browser: Browser):
    browser.open(write_report([run], tmp_path / "page.html"), scheme="dark")
    assert browser.find("body").value_of_css_property("background-color") == "rgba(20, 23, 27, 1)"
    assert "#6cb4f5" in browser.colors("loss")
    browser.shoot(tmp_path / "dark.png")
    browser.prefer("light")
    browser.until("return getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'")
    deadline = time.monotonic() + 20  # the plot is drawn anew a moment later
    while "#0b62b0" not in browser.colors("loss") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "#0b62b0" in browser.colors("loss")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(run: Run, tmp_path: Path, browser: Browser, scheme: str):
    """WCAG's contrast of text (4.5) and of lines that carry meaning (3)."""
    browser.open(write_report([run], tmp_path / "page.html"), scheme=scheme)
    names = ["paper", "panel", "mark", "ink", "quiet", "accent", "bad", *(f"series-{i}" for i in range(8))]
    script = """const style = getComputedStyle(document.documentElement);
      return arguments[0].map((name) => style.getPropertyValue(`--${name}`))"""
    colors = dict(zip(names, browser.run(script, names), strict=True))

    def light(color: str) -> float:
        parts = [int(color.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((light(colors[one]), light(colors[other])))
        return (high + 0.05) / (low + 0.05)

    for text in ("ink", "quiet"):
        for ground in ("paper", "panel", "mark"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    for line in names[5:]:
        assert contrast(line, "paper") >= 3, line


@pytest.mark.parametrize("number", [1, 3])
def test_a_phone(make_run, tmp_path: Path, browser: Browser, number: int):
    runs = [make_run(f"a-run-with-a-rather-long-name-{i}", **{"optim.lr": i + 0.5}) for i in range(number)]
    browser.open(write_report(runs, tmp_path / "page.html"), width=320)
    browser.run("document.querySelectorAll('details').forEach((each) => each.open = true)")
    assert browser.run("return document.documentElement.scrollWidth") == 320
    assert browser.run("return Math.max(...[...document.querySelectorAll('canvas')].map((c) => c.clientWidth))") <= 320
    assert browser.drawn("loss") > 500
    browser.shoot(tmp_path / "phone.png")
    assert browser.complaints() == []


def test_skipped_steps_are_marked(run: Run, tmp_path: Path, browser: Browser):
    browser.open(write_report([run], tmp_path / "page.html"))
    assert "#b3261e" not in browser.colors("loss")
    append_jsonl(run.metrics, *records(41, 44, **{"train/skipped": 1.0, "train/loss": None}))
    browser.open(write_report([run], tmp_path / "page.html"))
    assert "#b3261e" in browser.colors("loss") & browser.colors("norm")
    assert browser.legend("loss")["training, smoothed"] == "2.116"
    assert "skipped steps" in browser.find("#numbers").text
    assert browser.complaints() == []


def test_samples_as_they_grew(run: Run, tmp_path: Path, browser: Browser):
    append_jsonl(run.samples, {"step": 50, "prompt": "<b>x", "text": "<b>x</b><script>alert(1)</script>"})
    browser.open(write_report([run], tmp_path / "page.html"))
    shown = browser.find("#sample-texts")
    assert shown.text == "<b>x</b><script>alert(1)</script>"
    assert shown.find_element("css selector", "b").text == "<b>x"
    browser.find("#earlier").click()
    assert (browser.find("#sample-label").text, shown.text) == ("after step 40 (4 of 5)", "Ada sees one 40.")
    browser.run(
        "const s = arguments[0]; s.value = 0; s.dispatchEvent(new Event('input'))", browser.find("#sample-step")
    )
    assert shown.text == "Ada sees one 10."
    assert not browser.find("#earlier").is_enabled()
    browser.find("#all-samples summary").click()
    browser.until("return document.querySelectorAll('#all-samples pre').length === 5")
    assert browser.complaints() == []


def test_several_prompts_of_a_step(run: Run, tmp_path: Path, browser: Browser):
    append_jsonl(run.samples, *({"step": 50, "prompt": name, "text": f"{name} sings."} for name in ("Ada", "Noël")))
    browser.open(write_report([run], tmp_path / "page.html"))
    assert browser.find("#sample-texts").text.split("\n") == ["Ada sings.", "Noël sings."]
    assert browser.find("#sample-label").text == "after step 50 (5 of 5)"
    browser.find("#all-samples summary").click()
    browser.until("return document.querySelectorAll('#all-samples pre').length === 6")
    assert browser.run("return document.querySelectorAll('#all-samples h3').length") == 5
    assert browser.complaints() == []


def test_core_by_task_is_one_plot(make_run, tmp_path: Path, browser: Browser):
    run = make_run(steps=10)
    tasks = {"core/copa": 0.6, "core/copa/centered": 0.2, "core/squad": 0.1, "core/squad/centered": 0.1}
    append_jsonl(run.metrics, *records(11, 20, **{"val/core": 0.15, **tasks}))
    browser.open(write_report([run], tmp_path / "page.html"))
    assert browser.run(LABELS) == [*PLOTS, "core", "core-tasks"]
    legend = browser.legend("core-tasks")
    assert (legend["copa"], legend["squad"]) == ("0.2", "0.1")
    assert browser.complaints() == []


def test_several_runs_and_numbers_without_a_plot_of_their_own(make_run, tmp_path: Path, browser: Browser):
    runs = [make_run("a"), make_run("b", steps=0)]
    append_jsonl(runs[1].metrics, *records(1, 30, **{"train/memory_bytes": 2.5e9, "val/core": 0.1}))
    browser.open(write_report(runs, tmp_path / "page.html"))
    assert browser.run(LABELS) == [*PLOTS, "core", "train/memory_bytes"]
    colors = browser.colors("loss")
    assert {"#0b62b0", "#b84a00"} <= colors
    assert browser.legend("train/memory_bytes") == {"step": "30", "b": "2.5B"}
    browser.shoot(tmp_path / "several.png")
    assert browser.complaints() == []


def test_seeds_are_a_band_that_goes_with_its_curve(make_run, tmp_path: Path, browser: Browser):
    for rate, seed in ((0.01, 1), (0.01, 2), (0.02, 1)):
        run = make_run(f"lr/{rate}-{seed}", steps=0, **{"optim.lr": rate, "train.seed": seed})
        append_jsonl(run.metrics, *records(1, 40, **{"train/grad_norm": 100 * rate + seed}))
    groups = groups_at([str(tmp_path / "lr")])
    browser.open(write_report([run for group in groups for run in group.runs], tmp_path / "page.html", groups=groups))
    assert browser.run(LABELS) == PLOTS
    legend = browser.legend("norm")
    assert (legend["optim.lr 0.01"], legend["optim.lr 0.02"]) == ("2.5", "3")
    assert browser.find("figure[data-plot=norm] .edge").value_of_css_property("display") == "none"
    before = browser.run(PIXELS, "norm")
    faint = browser.run(FAINT)
    assert faint > 1000  # the band
    browser.find("figure[data-plot=norm] .u-series:nth-child(2) th").click()
    browser.until(f"return (function () {{ {PIXELS} }})('norm') !== arguments[0]", before)
    assert browser.run(FAINT) < faint / 10
    assert browser.complaints() == []


FAINT = """const canvas = document.querySelector("figure[data-plot=norm] canvas");
const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
let faint = 0;
for (let i = 3; i < pixels.length; i += 4) faint += pixels[i] === 0x30;
return faint;"""


def test_before_the_first_step_and_both_of_the_last(make_run, tmp_path: Path, browser: Browser):
    run = make_run(steps=0)
    append_jsonl(run.metrics, {"step": 0, "tokens": 0, "time": 1.0, "val/loss": 5.5, "train/eval_loss": 5.6})
    browser.open(write_report([run], tmp_path / "page.html"))
    first = {"training, in evaluation": "5.6", "held out": "5.5", "held out, lowest": "5.5"}
    assert browser.legend("loss") == {"step": "0", **first}
    last = {"test/loss": 2.6, "test/bpb": 3.6}
    last |= {"val/loss": 2.5, "val/part_loss": 2.1, "val/bpb": 3.5, "val/part_bpb": 3.1, "train/eval_loss": 2.0}
    append_jsonl(run.metrics, *records(1, 39), *records(40, 40, **last))
    browser.open(write_report([run], tmp_path / "page.html"))
    shown = browser.legend("loss")
    names = ("training, in evaluation", "held out", "all held-out text", "held out, lowest", "test")
    assert [shown[name] for name in names] == ["2", "2.1", "2.5", "2.1", "2.6"]
    assert browser.legend("bpb") == {"step": "40", "held out": "3.1", "all held-out text": "3.5", "test": "3.6"}
    assert browser.run(LABELS) == PLOTS
    assert {"#00755a", "#b84a00", "#0b62b0"} <= browser.colors("loss")
    for axis in ("tokens", "time", "flops"):
        browser.find(f"input[value={axis}]").click()
        assert browser.drawn("loss") > 1000
    assert browser.complaints() == []


def test_on_paper(run: Run, tmp_path: Path, browser: Browser):
    """Printed from a dark screen, the page is light, and its plots are drawn anew for that."""
    browser.open(write_report([run], tmp_path / "page.html"), scheme="dark")
    browser.run("""addEventListener("beforeprint", () => queueMicrotask(() => {
      const canvas = document.querySelector("canvas");
      const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      let dark = 0, light = 0;
      for (let i = 0; i < pixels.length; i += 4) {
        const color = [...pixels.slice(i, i + 4)].join();
        light += color === "11,98,176,255";
        dark += color === "108,180,245,255";
      }
      window.seen = [getComputedStyle(document.body).backgroundColor, light > 100, dark];
    }))""")
    assert len(browser.driver.print_page()) > 10_000
    assert browser.run("return window.seen") == ["rgb(255, 255, 255)", True, 0]
    assert browser.run("return document.documentElement.className") == ""
    assert "#6cb4f5" in browser.colors("loss")
