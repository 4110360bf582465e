"""What the report card opens with."""

from __future__ import annotations

import pytest

from engine.evaluation.card_pages import marked_differences


@pytest.mark.parametrize(
    ("reference", "generated", "there", "here"),
    [
        ("右肺结节。", "右肺结节。", "右肺结节。", "右肺结节。"),
        (
            "右肺上野结节，12mm。",
            "右肺上野空洞，12mm。",
            "右肺上野<del>结节</del>，12mm。",
            "右肺上野<ins>空洞</ins>，12mm。",
        ),
        ("size 12 mm", "size 12.5 mm", "size <del>12</del> mm", "size <ins>12.5</ins> mm"),
        ("无", "", "<del>无</del>", ""),
        ("a < b", "a < c", "a &lt; <del>b</del>", "a &lt; <ins>c</ins>"),
        ("结节", "<script>", "<del>结节</del>", "<ins>&lt;script&gt;</ins>"),
    ],
)
def test_what_one_report_alone_says_is_marked(reference: str, generated: str, there: str, here: str) -> None:
    assert marked_differences(reference, generated) == (there, here)


def test_nothing_of_a_text_is_lost() -> None:
    reference, generated = "右中肺野见厚壁空洞，约26mm。结论：空洞。", "左侧肺野见结节影，约8mm。【待核实】结论：结节。"
    for text, marked in zip((reference, generated), marked_differences(reference, generated), strict=True):
        for tag in ("ins", "del", "mark"):
            marked = marked.replace(f"<{tag}>", "").replace(f"</{tag}>", "")
        assert marked == text
