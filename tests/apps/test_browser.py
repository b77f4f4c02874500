"""The chat widget in JupyterLab, driven by a browser's keys and clicks; asserts on the page's content.

python -m pytest -m browser -n 0          (SCREENSHOTS=docs: also takes the README's pictures)
"""

import itertools
import os
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests import browser

pytestmark = pytest.mark.browser
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SCREENSHOTS = os.environ.get("SCREENSHOTS")
EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
BUILD = """from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.apps.widget import ChatWidget
model = from_pretrained(cache_size=3, prefetch=2, device="cpu", throttle={throttle!r})
chat = ChatWidget(model, load_tokenizer())"""
STORY = "Tell me a story about a fox."


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if browser.missing():
        reason = f"missing: {browser.missing()}"
        pytest.fail(reason) if os.environ.get("REQUIRE_BROWSER") else pytest.skip(reason)
    folder = tmp_path_factory.mktemp("lab")
    with browser.jupyterlab(folder) as url:
        yield folder, url


@pytest.fixture
def page(lab, tmp_path, request):
    with browser.chromium(viewport={"width": 1100, "height": 1000}, device_scale_factor=1.5) as page:
        page.set_default_timeout(60_000)
        yield page
        picture = tmp_path / "at_the_end.png"
        page.screenshot(path=picture)
        print(f"the page at the end: {picture}")


def run(page, lab, *cells: str) -> None:
    """Open a notebook of these cells and run all of it."""
    python = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    run_notebook(page, lab, new_notebook(cells=[new_code_cell(cell) for cell in cells], metadata=python))


def run_notebook(page, lab, notebook) -> None:
    folder, url = lab
    name = f"{len(list(folder.glob('*.ipynb')))}.ipynb"
    nbformat.write(notebook, folder / name)
    browser.open_notebook(page, url, name)
    browser.run_all(page)


def chat_notebook(throttle: str):
    """The shipped notebook over a throttled link, so that there is time to watch an answer."""
    notebook = nbformat.read(NOTEBOOKS / "3_chat.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if "from_pretrained(source" in cell.source)
    cell.source = cell.source.replace("cache_size=3", f"cache_size=3, throttle={throttle!r}")
    assert throttle in cell.source
    return notebook


class Chat:
    """The widget on the page."""

    def __init__(self, page):
        self.page, self.root = page, page.locator(".mo-chat").first
        self.root.wait_for()
        self.field = self.root.get_by_placeholder("Write a message")
        self.answers = self.root.locator(".mo-assistant")

    def button(self, name: str):
        return self.root.get_by_role("button", name=name, exact=True)

    def say(self, text: str) -> None:
        self.field.fill(text)
        self.field.press("Enter")

    def watch(self, n_answers: int, until=lambda seen: False) -> list[str]:
        """What the newest answer looked like, again and again, until it is complete (or `until` says so)."""
        self.button("Stop").and_(self.page.locator(":enabled")).wait_for()
        seen = []
        while self.button("Stop").is_enabled() and not until(seen):
            if self.answers.count() == n_answers:
                text = self.answers.nth(n_answers - 1).inner_text()
                if not seen or text != seen[-1]:
                    seen.append(text)
            time.sleep(0.05)
        return seen

    def wait(self) -> None:
        self.button("Send").and_(self.page.locator(":enabled")).wait_for()

    def ask(self, text: str) -> str:
        n_before = self.answers.count()
        self.say(text)
        self.answers.nth(n_before).wait_for()
        self.wait()
        return self.answers.nth(n_before).inner_text()

    def status(self) -> str:
        return self.root.locator(".mo-status").inner_text()

    def experts(self) -> str:
        return self.root.locator(".mo-experts table").inner_html()


def test_a_conversation(page, lab):
    run_notebook(page, lab, chat_notebook("3MB"))
    chat = Chat(page)
    assert "Your name is Ana." in chat.answers.last.inner_text()  # sent from code
    chat.button("Clear").click()
    chat.root.get_by_text("Nothing said yet").wait_for()
    before = chat.experts()

    chat.say(STORY)
    assert chat.root.locator(".mo-user").inner_text() == STORY
    tables, speeds = set(), set()

    def look(seen):
        tables.add(chat.experts())
        speeds.add(chat.status())
        return False

    seen = chat.watch(1, look)
    assert len(seen) >= 5 and all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(seen))
    whole = chat.answers.first.inner_text()
    assert whole.startswith(seen[-1]) and len(whole) > 150
    assert len(tables) >= 5 and before not in tables and len(speeds) >= 5
    assert all(word in chat.status() for word in ("tokens/s", "hits", "MB moved", "of 1024 tokens"))

    chat.say(STORY)
    seen = chat.watch(2, lambda seen: len(seen) >= 3)
    clicked = time.monotonic()
    chat.button("Stop").click()
    chat.wait()
    assert time.monotonic() - clicked < 3
    stopped = chat.answers.nth(1).inner_text()
    assert stopped.startswith(seen[-1]) and len(stopped) < len(whole) - 50
    assert "stopped" in chat.status()

    assert "Paris" in chat.ask("What is the capital of France?")
    assert "stopped" not in chat.status()
    chat.button("Clear").click()
    chat.root.get_by_text("Nothing said yet").wait_for()
    assert chat.answers.count() == 0
    assert "Lima" in chat.ask("What is the capital of Peru?")


def test_regenerate_edit_and_settings(page, lab):
    run(page, lab, BUILD.format(throttle=None), "chat")
    chat = Chat(page)
    assert "Paris" in chat.ask("What is the capital of France?")
    chat.field.fill("What is 2 + 2?")
    chat.button("Edit last").click()
    cancel = chat.button("Cancel edit")
    cancel.wait_for()
    assert chat.field.input_value() == "What is the capital of France?"
    assert chat.button("Regenerate").is_disabled()
    cancel.click()
    chat.button("Edit last").wait_for()
    assert chat.field.input_value() == "What is 2 + 2?" and chat.button("Send").is_enabled()
    chat.button("Edit last").click()
    resend = chat.button("Resend")
    resend.wait_for()
    assert chat.field.input_value() == "What is the capital of France?"
    chat.field.fill("What is the capital of Peru?")
    resend.click()
    chat.answers.filter(has_text="Lima").wait_for()
    chat.wait()
    assert chat.answers.count() == 1
    chat.root.get_by_text("Settings").click()
    limit = chat.root.get_by_label("max tokens")
    limit.fill("3")
    limit.press("Tab")
    chat.button("Regenerate").click()
    chat.root.locator(".mo-status", has_text="cut at 3 tokens").wait_for()
    assert chat.answers.count() == 1 and "Lima" not in chat.answers.inner_text()


def test_what_cannot_be_answered_stays_in_the_field(page, lab):
    run(page, lab, BUILD.format(throttle=None), "chat")
    chat = Chat(page)
    chat.root.get_by_text("Settings").click()
    seed = chat.root.get_by_label("seed")
    seed.fill("seven")
    seed.press("Tab")
    chat.say(STORY)
    chat.root.locator(".mo-error", has_text="impossible seed").wait_for()
    assert chat.field.input_value() == STORY and chat.button("Send").is_enabled()
    seed.fill("")
    seed.press("Tab")
    long = "hello " * 2000
    chat.say(long)
    chat.root.locator(".mo-error", has_text="longer than the model's context").wait_for()
    assert chat.field.input_value().strip() == long.strip()
    assert "Paris" in chat.ask("What is the capital of France?")
    assert chat.root.locator(".mo-error").count() == 0 and chat.field.input_value() == ""


def test_nothing_that_is_said_becomes_part_of_the_page(page, lab):
    cell = f"""chat.session.messages = [
    {{"role": role, "content": {EVIL!r}}} for role in ("user", "assistant")
]
chat.refresh()
chat"""
    run(page, lab, BUILD.format(throttle=None), cell)
    chat = Chat(page)
    chat.answers.wait_for()
    assert chat.answers.inner_text() == EVIL
    chat.ask(EVIL)
    assert chat.root.locator(".mo-user").all_inner_texts() == [EVIL, EVIL]
    assert chat.root.locator("img, script").count() == 0
    assert page.evaluate("window.hacked") is None


@pytest.mark.skipif(not SCREENSHOTS, reason="takes the README's pictures, where SCREENSHOTS names a folder")
def test_screenshots(page, lab):
    folder = Path(SCREENSHOTS).absolute()
    folder.mkdir(exist_ok=True)
    run(page, lab, BUILD.format(throttle="3MB"), "chat")
    chat = Chat(page)
    for text in ("My name is Ana.", "What is 47 + 38?"):
        chat.ask(text)
    chat.say(STORY)
    chat.watch(3, lambda seen: len(seen) >= 8)
    chat.root.screenshot(path=folder / "chat-widget.png")
    for name, picture, number in (
        ("4_expert_activations", "activations", 0),
        ("5_caching_and_prefetching", "caching", 0),
    ):
        (lab[0] / f"{name}.ipynb").write_bytes((NOTEBOOKS / f"{name}.ipynb").read_bytes())
        browser.open_notebook(page, lab[1], f"{name}.ipynb")
        image = page.locator(".jp-OutputArea-output img").nth(number)
        image.scroll_into_view_if_needed()
        page.wait_for_timeout(1500)
        page.screenshot(path=folder / f"notebook-{picture}.png")
