"""The chat page keeps what was written: versions, branches, drafts, names, files; and shows what models write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.browser import SUM, OpenPage

BLOCKED = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } });"
FORMULAS = [r"\(E=mc^2\)", r"\[E=mc^2\]", "$$E=mc^2$$", "$E=mc^2$", "\\[\nE=mc^2\n\\]", "$$\nE\n=\nmc^2\n$$"]


def test_the_old_answer_stays_until_the_new_one_has_text_and_both_can_be_seen(visit: OpenPage) -> None:
    chat = visit()
    chat.answer_with("the first")
    chat.ask("x")
    chat.page.route("**/chat/completions", lambda route: route.abort())
    chat.page.click(".regenerate")
    chat.page.wait_for_selector("#toast:not([hidden])")
    assert chat.answer() == "the first"  # the attempt failed: nothing is lost
    assert chat.page.locator(".versions").count() == 0
    chat.answer_with("the second")
    chat.page.click(".regenerate")
    chat.page.wait_for_selector(".prose >> text=the second")
    assert chat.page.inner_text(".answer .versions").strip() == "2/2"
    chat.page.click(".answer .versions button:first-child")
    assert chat.answer() == "the first"
    chat.open()  # the choice is kept
    assert chat.answer() == "the first"
    assert chat.page.inner_text(".answer .versions").strip() == "1/2"


def test_a_draft_and_the_settings_of_an_empty_conversation_survive_a_reload(visit: OpenPage) -> None:
    chat = visit()
    chat.ask("1+1")
    chat.page.click("#new")
    chat.page.fill("#question", "half a question")
    chat.page.click("#open-settings")
    chat.page.fill("#set-system", "Be brief.")
    chat.page.keyboard.press("Escape")
    chat.wait_until("JSON.stringify(localStorage).includes('half a question')")
    chat.open()
    assert chat.page.input_value("#question") == "half a question"
    assert chat.page.inner_text("#system-note") == "System prompt: Be brief."
    assert chat.titles() == ["1+1"]  # without a question it is not listed
    chat.page.click("#list .entry")
    assert chat.page.input_value("#question") == ""


def test_conversations_are_searched_and_renamed(visit: OpenPage) -> None:
    chat = visit()
    for question in ("hello", "1+1"):
        chat.ask(question)
        chat.page.click("#new")
    chat.page.keyboard.press("Control+k")
    chat.page.keyboard.type("two:")  # in an answer
    assert chat.titles() == ["1+1"]
    chat.page.keyboard.press("Escape")
    assert chat.titles() == ["1+1", "hello"]
    assert chat.page.locator("#list .day").all_inner_texts() == ["Today"]
    chat.page.click("#list .entry >> text=hello")
    chat.page.click("#list li:has([aria-current]) .rename")
    chat.page.keyboard.press("ControlOrMeta+A")
    chat.page.keyboard.type("A greeting")
    chat.page.keyboard.press("Enter")
    chat.open()
    assert chat.titles() == ["1+1", "A greeting"]


def test_all_conversations_leave_as_a_file_and_come_back(visit: OpenPage, tmp_path: Path) -> None:
    chat = visit()
    chat.ask("1+1")
    chat.page.click("#more")
    with chat.page.expect_download() as download:
        chat.page.click("#export")
    file = tmp_path / "conversations.json"
    download.value.save_as(file)
    assert json.loads(file.read_text(encoding="utf-8"))["format"] == "chatglm-conversations"
    other = visit()
    other.page.set_input_files("#import-file", file)
    other.page.click("#list .entry >> text=1+1")
    assert other.answer() == SUM
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[1]")
    other.page.set_input_files("#import-file", wrong)
    other.page.wait_for_selector("#toast >> text=is not a file of exported conversations")
    other.page.click("#more")
    with other.page.expect_download() as download:
        other.page.click("#save-markdown")
    download.value.save_as(file)
    assert file.read_text(encoding="utf-8") == f"# 1+1\n\n**Question**\n\n1+1\n\n**Answer**\n\n{SUM}\n"


def test_a_cut_answer_is_continued(visit: OpenPage) -> None:
    chat = visit()
    chat.page.click("#open-settings")
    chat.page.fill("#set-max_tokens", "4")
    chat.page.keyboard.press("Escape")
    chat.ask("1+1")
    begun = chat.answer()
    assert SUM.startswith(begun)
    assert begun != SUM
    chat.page.click("#open-settings")
    chat.page.click("#defaults")
    chat.page.keyboard.press("Escape")
    chat.page.click(".carry-on")
    chat.wait_for_answer()
    assert chat.answer() == SUM
    body = chat.bodies[-1]
    assert body["continue_final_message"] is True
    assert body["messages"][-1] == {"role": "assistant", "content": begun}


def test_a_text_file_goes_along_and_another_is_refused(visit: OpenPage, tmp_path: Path) -> None:
    chat = visit()
    text, binary = tmp_path / "notes.md", tmp_path / "picture.png"
    text.write_text("a ``` fence\n")
    binary.write_bytes(b"\x89PNG\0\xff")
    chat.page.set_input_files("#files", [text, binary])
    chat.page.wait_for_selector("#toast >> text=“picture.png” is not a text file.")
    chat.ask("summarise")
    assert chat.bodies[0]["messages"][0]["content"] == "notes.md\n````\na ``` fence\n````\n\nsummarise"
    assert chat.page.inner_text(".bubble .file").strip() == "notes.md"


@pytest.mark.parametrize("formula", FORMULAS)
def test_mathematics_is_rendered(visit: OpenPage, formula: str) -> None:
    chat = visit()
    chat.answer_with(f"Energy:\n\n{formula}\n\nand `$x$`.")
    chat.ask("physics")
    assert chat.page.locator(".prose math").count() == 1
    assert (chat.page.text_content(".prose math") or "").strip() == "E=mc2"
    assert chat.page.inner_text(".prose code") == "$x$"


@pytest.mark.parametrize("text", [r"open \[E=mc^2", "costs $5 and $6", r"open \( x"])
def test_what_is_no_formula_stays_as_it_was_written(visit: OpenPage, text: str) -> None:
    chat = visit()
    chat.answer_with(text)
    chat.ask("x")
    assert chat.answer() == text


def test_formulas_run_nothing(visit: OpenPage) -> None:
    chat = visit()
    chat.answer_with(
        r"$$\href{javascript:window.hacked=1}{x} \style{color:red}{y} \includegraphics{https://far.example/x.png}$$"
    )
    chat.ask("x")
    assert chat.page.locator(".prose a, .prose img, .prose [style], .prose [href]").count() == 0
    assert chat.page.evaluate("window.hacked") is None


def test_tables_are_aligned_and_scroll_and_tasks_have_boxes(visit: OpenPage) -> None:
    chat = visit(viewport={"width": 500, "height": 600})
    row = " | ".join(["word" * 8] * 6)
    chat.answer_with(f"| {' | '.join('abcdef')} |\n|:-:|--:|---|---|---|---|\n| {row} |\n\n- [x] done\n- [ ] open")
    chat.ask("x")
    assert chat.page.evaluate("getComputedStyle(document.querySelector('.prose td.center')).textAlign") == "center"
    assert chat.page.evaluate("(t => t.scrollWidth > t.clientWidth)(document.querySelector('.table'))")
    assert chat.page.locator(".prose li").all_inner_texts() == ["☑ done", "☐ open"]


def test_thoughts_are_folded(visit: OpenPage) -> None:
    chat = visit()
    chat.answer_with("<think>\nhmm\n</think>\n\nFour.")
    chat.ask("2+2")
    assert chat.answer() == "Four."
    assert not chat.page.is_visible(".thoughts .prose")
    chat.page.click(".thoughts summary")
    assert chat.page.inner_text(".thoughts .prose").strip() == "hmm"


def test_a_browser_that_forbids_storage_shows_a_working_page(visit: OpenPage) -> None:
    chat = visit(script=BLOCKED)
    assert "The browser forbids storage" in chat.page.inner_text("#toast")
    chat.ask("1+1")
    assert chat.answer() == SUM


def test_a_value_out_of_range_says_why_and_the_old_one_stays(visit: OpenPage) -> None:
    chat = visit()
    chat.page.click("#open-settings")
    chat.page.fill("#set-max_tokens", "0")
    assert chat.page.inner_text("#why-max_tokens") == "A number from 1 to 131072; 2048 stays in force."
    chat.page.click("#settings summary")
    chat.page.fill("#set-seed", "7")
    chat.page.fill("#set-top_k", "40")
    chat.page.keyboard.press("Escape")
    chat.ask("1+1")
    assert (chat.bodies[0]["seed"], chat.bodies[0]["top_k"], "max_tokens" in chat.bodies[0]) == (7, 40, False)


def test_an_answer_that_is_too_long_for_the_context_names_the_setting(visit: OpenPage) -> None:
    chat = visit()
    chat.page.click("#open-settings")
    chat.page.fill("#set-max_tokens", "100000")
    chat.page.keyboard.press("Escape")
    chat.ask("1+1")
    assert "lower max_tokens in the settings" in chat.page.inner_text(".failure")


def test_on_a_phone_enter_makes_a_line(visit: OpenPage) -> None:
    chat = visit(viewport={"width": 390, "height": 700}, has_touch=True, is_mobile=True)
    chat.page.click("#question")
    chat.page.keyboard.type("one")
    chat.page.keyboard.press("Enter")
    chat.page.keyboard.type("two")
    assert chat.page.input_value("#question") == "one\ntwo"
    assert chat.bodies == []


def test_a_long_conversation_opens_without_drawing_all_of_it(visit: OpenPage) -> None:
    chat = visit()
    chat.ask("1+1")
    chat.page.evaluate(
        """() => {
          const name = Object.keys(localStorage).find((key) => key.startsWith("chatglm.conversation."));
          const kept = JSON.parse(localStorage.getItem(name));
          for (let i = 0; i < 300; i += 1) {
            kept.nodes.push({ id: `q${i}`, parent: kept.leaf, role: "user", text: `question ${i}`, files: [] });
            kept.nodes.push({ ...kept.nodes[1], id: `a${i}`, parent: `q${i}`, text: `**answer** ${i}\n\n`.repeat(9) });
            kept.leaf = `a${i}`;
          }
          localStorage.setItem(name, JSON.stringify(kept));
        }"""
    )
    chat.open()
    assert chat.page.locator(".turn").count() == 301
    assert chat.page.locator(".prose strong").count() < 9 * 100  # those near the window
    chat.page.evaluate("document.querySelector('.turn').scrollIntoView()")
    chat.page.wait_for_selector(".turn:nth-child(2) .prose strong")
    first = chat.page.query_selector(".turn")
    chat.ask("thanks")
    assert first is not None
    assert first.evaluate("node => node.isConnected")  # sending draws one turn, not all of them anew


def test_nothing_violates_the_rules_of_accessibility(visit: OpenPage) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for options in ({}, {"color_scheme": "dark"}, {"viewport": {"width": 390, "height": 700}, "locale": "zh-CN"}):
        chat = visit(bypass_csp=True, **options)
        chat.answer_with("# Title\n\n`code` and $x^2$\n\n```python\nx = 1\n```\n\n| a |\n|---|\n| b |")
        chat.ask("x")
        for opened in ("", "#open-settings"):
            if opened:
                chat.page.click(opened)
            found = axe.run(chat.page).response["violations"]
            assert [(each["id"], [node["html"][:80] for node in each["nodes"]]) for each in found] == []
