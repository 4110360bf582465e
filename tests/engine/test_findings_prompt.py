"""What a findings prompt says: of the segmentation, of the head, of both; and its place before the question."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from data.finding_targets import LEAST_POSITIVE, MOST_LESIONS, descriptors
from data.findings import DESCRIPTORS, LESION, FindingRecord, Measurement
from data.medical_vlm_dataset import encode_prompt
from engine.findings_prompt import (
    AT_ONCE,
    SAMPLES,
    TURNS,
    batch_believed,
    believed,
    calibrate,
    closest_reports,
    deviation_notice,
    deviations,
    doubtful,
    learnt_findings,
    right_beginning,
    rows_of,
    set_sizes,
    set_up_findings,
    states,
    with_key_points,
)
from models.findings_head import TYPICAL_MM, FindingsHead, Found
from models.language_model.decoding import INCOMPLETE, Varied
from models.medical_vlm import prompt_ids
from tests.models.language_model.tiny import byte_tokenizer

NAMES = ("nodule", "effusion")
MODES = ("off", "measured", "predicted", "both")
FALSE = len(NAMES)


@pytest.fixture(scope="module")
def head() -> FindingsHead:
    return FindingsHead(NAMES, 8, DESCRIPTORS, width=16)


def one_hot(index: int, classes: int, sure: float) -> list[float]:
    """Logits that give class ``index`` the probability ``sure``."""
    return [math.log(sure / (1 - sure) * (classes - 1)) if k == index else 0.0 for k in range(classes)]


def says(
    presence: tuple[float, float] = (0.01, 0.01), lesions: tuple[tuple[int, float, float], ...] = (), mm: float = 12.0
) -> Found:
    """One case: probabilities of the two findings, both left and in the lower level; kind, probability and size factor
    of each measured lesion."""
    rows = [*lesions, *[(FALSE, 0.9, 1.0)] * (MOST_LESIONS - len(lesions))]
    place = torch.tensor([[one_hot(0, 3, 0.9)] * 2]), torch.tensor([[one_hot(2, 3, 0.9)] * 2])
    kinds = torch.tensor([[one_hot(kind, len(NAMES) + 1, sure) for kind, sure, _ in rows]])
    factors = torch.tensor([[factor for *_, factor in rows]]).log()
    size = torch.full((1, 2), math.log(mm / TYPICAL_MM))
    return Found(torch.tensor([presence]).logit(), *place, size, kinds, factors)


def lesion(side: str = "right", zone: str = "upper", mm: float = 10.0) -> FindingRecord:
    return FindingRecord(LESION, side=side, zone=zone, size_mm=mm, source="segmentation")


def points(said: list[FindingRecord] | None) -> list[tuple]:
    return [(f.finding, f.side, f.zone, round(f.size_mm)) for f in said]


def test_off_says_nothing(head: FindingsHead) -> None:
    assert believed(head, says(), [lesion()], "off") is None


def test_measured_lesions_have_no_name_and_none_is_said_too(head: FindingsHead) -> None:
    assert believed(head, says((0.9, 0.9)), [lesion()], "measured") == [lesion()]
    assert believed(None, None, [], "measured") == []
    assert believed(head, says(), None, "measured") is None, "nobody looked for lesions"


def test_predicted_findings_have_place_size_and_probability(head: FindingsHead) -> None:
    said = believed(head, says((0.8, 0.3)), [lesion()], "predicted")
    assert points(said) == [("nodule", "left", "lower", 12)]
    assert said[0].probability == pytest.approx(0.8) and said[0].source == "predicted"
    assert believed(head, says((0.49, 0.49)), [], "predicted") == []
    assert believed(head, says((0.8, 0.3)), None, "predicted") == said, "without a segmentation too"
    assert believed(None, None, [lesion()], "predicted") is None


def test_both_gives_a_measured_lesion_the_heads_name_and_size(head: FindingsHead) -> None:
    said = believed(head, says(lesions=((0, 0.8, 1.2),)), [lesion(mm=10.0)], "both")
    assert points(said) == [("nodule", "right", "upper", 12)]
    assert said[0].probability == pytest.approx(0.8) and said[0].source == "segmentation"
    assert believed(None, None, [lesion()], "both") == [lesion()]
    assert believed(None, None, None, "both") is None


def test_a_false_lesion_is_not_said(head: FindingsHead) -> None:
    measured = [lesion(), lesion("left", "lower", 6.0)]
    assert points(believed(head, says(lesions=((FALSE, 0.9, 1.0), (0, 0.9, 1.0))), measured, "both")) == [
        ("nodule", "left", "lower", 6)
    ]


def test_an_unsure_lesion_has_the_likeliest_name(head: FindingsHead) -> None:
    said = believed(head, says(lesions=((1, 0.4, 1.0),)), [lesion()], "both")
    assert points(said) == [("effusion", "right", None, 10)] and said[0].probability == pytest.approx(0.4)


def test_both_adds_what_the_head_alone_is_sure_of(head: FindingsHead) -> None:
    """A finding of the scan that a measured lesion is, is said once."""
    found = says((0.9, 0.9), lesions=((0, 0.9, 1.0),))
    assert [f.finding for f in believed(head, found, [lesion()], "both")] == ["nodule", "effusion"]
    assert [f.finding for f in believed(head, says((0.9, 0.9)), None, "both")] == ["nodule", "effusion"]


def test_a_lesion_is_not_said_twice() -> None:
    """A finding that is mostly segmented, at the place of a lesion with another name; one like emphysema is said."""
    head = FindingsHead(("nodule", "consolidation"), 8, DESCRIPTORS, width=16)
    found = says((0.9, 0.1), lesions=((1, 0.6, 1.0),))
    at, elsewhere = [lesion("left", "lower")], [lesion("left", "upper")]
    assert [f.finding for f in believed(head, found, at, "both")] == ["consolidation", "nodule"]
    head.segmented[0] = True
    assert [f.finding for f in believed(head, found, at, "both")] == ["consolidation"]
    assert [f.finding for f in believed(head, found, elsewhere, "both")] == ["consolidation", "nodule"]


@pytest.mark.parametrize("mode", ["predicted", "both"])
def test_an_effusion_has_no_level(head: FindingsHead, mode: str) -> None:
    found = says((0.01, 0.9), lesions=((1, 0.9, 1.0),))
    assert [(f.finding, f.zone, f.lobe) for f in believed(head, found, [lesion()], mode)] == [("effusion", None, None)]


def test_only_the_largest_lesions_are_said(head: FindingsHead) -> None:
    many = [lesion(mm=40.0 - k) for k in range(MOST_LESIONS + 3)]
    for mode, found in (("measured", None), ("both", says(lesions=((0, 0.9, 1.0),) * MOST_LESIONS))):
        assert [f.size_mm for f in believed(head, found, many, mode)] == pytest.approx([40.0 - k for k in range(8)])


def test_a_batch_is_its_cases(head: FindingsHead) -> None:
    cases = [says((0.9, 0.1)), says((0.1, 0.9))]
    batch = Found(*(torch.cat(parts) for parts in zip(*cases, strict=True)))
    measured = [[lesion()], None]
    for mode in MODES:
        alone = [believed(head, found, one, mode) for found, one in zip(cases, measured, strict=True)]
        assert batch_believed(head, batch, measured, mode) == alone
    assert rows_of(None, 2) == [None, None]


# ------------------------------------------------------------------ before the question


def batch_of(question: str) -> dict[str, Tensor]:
    ids = torch.tensor(encode_prompt(byte_tokenizer(), question, 99))
    return {"question_ids": ids[None].repeat(3, 1), "question_mask": torch.ones(3, len(ids), dtype=torch.long)}


def test_the_prompt_stands_before_the_question_and_is_absent_where_nothing_is_known() -> None:
    tokenizer = byte_tokenizer()
    batch = with_key_points(batch_of("Q?"), tokenizer, [[lesion()], [], None], "zh")
    read = [tokenizer.decode(prompt_ids(batch, b)) for b in range(3)]
    assert read == ["已知：右肺上野病灶10mm。Q?\n", "已知：未见病灶。Q?\n", "Q?\n"]
    assert tokenizer.decode(prompt_ids(batch, 0)) == tokenizer.decode(
        encode_prompt(tokenizer, "Q?", 99, "已知：右肺上野病灶10mm。")
    ), "as the check script and Stage 0 write it"


def test_an_unknown_language_has_no_prompt() -> None:
    batch = with_key_points(batch_of("Q?"), byte_tokenizer(), [[lesion()]] * 3, None)
    assert batch["key_point_ids"].numel() == 0 and byte_tokenizer().decode(prompt_ids(batch, 0)) == "Q?\n"


# ------------------------------------------------------------------ what is learnt


def table(stated: list[list[FindingRecord]], language: str | None = "zh") -> SimpleNamespace:
    return SimpleNamespace(stated=stated, language=language, findings=None)


def test_what_is_too_rare_is_printed_and_not_learnt(capsys: pytest.CaptureFixture[str]) -> None:
    train = table([[FindingRecord("nodule")]] * LEAST_POSITIVE + [[FindingRecord("cavity")]] * 3)
    val = table([], language=None)
    assert learnt_findings(train, val) == ["nodule"]
    assert train.findings == val.findings == ["nodule"] and val.language == "zh", (
        "one validation report says too little"
    )
    printed = capsys.readouterr().out
    assert "too rare to be learnt, below 10 training reports: cavity (3)" in printed
    assert "findings head: nodule\n" in printed
    assert learnt_findings(train, val, ("effusion",)) == ("effusion",), "of a checkpoint's head"


def test_reports_of_an_unknown_language_are_said_and_teach_no_head(capsys: pytest.CaptureFixture[str]) -> None:
    assert learnt_findings(table([], language=None), table([])) == ()
    assert "no findings head, no findings prompt" in capsys.readouterr().out


class SizedTable:
    """A nodule a case, of 15 mm and more, which the report states two thirds as large; nobody looked in the first."""

    def __init__(self, count: int) -> None:
        shape = Measurement(1, 500.0, -50.0, 1, 1, 1, thick_mm=10.0)
        self.lesions = [replace(lesion(mm=15.0 + k), measured=shape) for k in range(count)]
        self.stated = [[FindingRecord("nodule", side="right", size_mm=one.size_mm / 1.5)] for one in self.lesions]

    def __len__(self) -> int:
        return len(self.lesions)

    def measured(self, row: int) -> list[FindingRecord] | None:
        return [self.lesions[row]] if row else None


def test_sizes_are_fitted_on_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """A head that had learnt its sizes forgets them."""
    head = FindingsHead(NAMES, 8, DESCRIPTORS, width=16)
    head.of_lesion.bias.data[-1] = 1.0

    set_sizes(None, SizedTable(9))
    set_sizes(head, SizedTable(9), SizedTable(9))
    assert "lesion sizes: 16 stated of measured lesions, too few to fit: said as measured" in capsys.readouterr().out
    lesions = torch.tensor([descriptors(SizedTable(9).measured(4))])
    assert not head(torch.zeros(1, 1, 8), lesions).lesion_size.any()
    set_sizes(head, SizedTable(30), SizedTable(9))
    assert (
        "lesion sizes: 37 stated; nine in ten measured ones differ from these by at most 50 %, nine in ten fitted ones"
        in capsys.readouterr().out
    )
    head.of_lesion.bias.data[:] = torch.tensor([9.0, -9.0, -9.0, 0.0])
    factor = head(torch.zeros(1, 1, 8), lesions).lesion_size[0, 0].exp().item()
    assert factor == pytest.approx(1 / 1.5, abs=0.02)


def test_calibration_reads_all_batches(head: FindingsHead) -> None:
    """Of two batches one alone would say that a probability of .9 is always right."""
    unknown = torch.full((1, MOST_LESIONS), -100)
    targets = [says()._replace(presence=torch.tensor([one]), lesion=unknown) for one in ([1, 1], [0, 1])]
    batches = [(torch.tensor([row]), says((0.9, 0.9)), target) for row, target in enumerate(targets)]
    calibrate(Accelerator(cpu=True), head, batches)
    sure = head.probabilities(says((0.9, 0.9))).presence[0, 0].item()
    assert sure == pytest.approx(0.75, abs=0.02), "three of four"


# ------------------------------------------------------------------ reports that say what their prompt says

NODULE = FindingRecord("nodule", side="right", zone="upper", size_mm=12.4)
SAID = [NODULE, FindingRecord("effusion", side="left", size_mm=20.0)]
RIGHT = "所见：右上肺野见结节，直径约12mm。左侧胸腔积液，深约20mm。结论：右肺上野结节，左侧胸腔积液。"


@pytest.mark.parametrize(
    ("report", "left_out", "besides"),
    [
        (RIGHT, 0, 0),
        (RIGHT.replace("12", "13"), 0, 0),  # 12.4 is stated as 12, and read within a millimetre
        (RIGHT.replace("12", "15"), 1, 1),  # the nodule is missing, and another one is there
        (RIGHT.replace("右上肺野", "左上肺野"), 1, 2),  # on the left in the findings, on the right in the impression
        ("所见：右上肺野见结节，直径约12mm。结论：右肺上野结节。", 1, 0),
        (RIGHT.replace("。结论", "。左下肺野见空洞，直径约9mm。结论"), 0, 0),  # no kind that the prompt would have said
        (RIGHT.replace("。结论", "。左下肺野见结节，直径约9mm。结论"), 0, 1),
        ("所见：两肺未见异常。结论：未见异常。", 2, 0),
        ("", 2, 0),
    ],
)
def test_deviations_are_points_left_out_and_findings_besides(report: str, left_out: int, besides: int) -> None:
    missing, more = deviations(report, SAID, NAMES, "zh")
    assert (len(missing), len(more)) == (left_out, besides)
    assert all(point in SAID for point in missing)
    notice = deviation_notice(report, SAID, NAMES, "zh")
    assert notice.count("【系统提示】") == bool(left_out) + bool(besides)


def test_a_notice_names_what_deviates() -> None:
    """In the report's language, and the point by its place and size: the impression repeats the left one as right."""
    other = RIGHT.replace("右上肺野", "左上肺野")
    left_out = "【系统提示】下文没有写出：右肺上野结节12mm。"
    besides = "【系统提示】下文另写了征象提示之外的：左肺上野结节12mm；右肺上野结节。"
    assert deviation_notice(other, SAID, NAMES, "zh") == f"{left_out} {besides}"
    english = "Findings: normal lungs. Impression: normal."
    assert deviation_notice(english, [NODULE], NAMES, "en") == (
        "[System note] The text leaves out: right upper zone nodule 12 mm."
    )


def test_a_lesion_without_a_name_is_stated_by_any_finding_of_its_place_and_size() -> None:
    point = FindingRecord(LESION, side="right", zone="upper", size_mm=12.0)
    assert states(NODULE, point) and not states(replace(NODULE, zone="lower"), point)
    assert not states(NODULE, replace(point, size_mm=14.0)) and states(NODULE, replace(point, size_mm=None))
    assert states(NODULE, NODULE) and not states(NODULE, replace(NODULE, finding="mass"))


class Pen:
    """Gives reports from a list; ``asked``: rows and turns; ``begun``: the beginning of each prompt's first row."""

    def __init__(self, *turns: list[str]) -> None:
        self.turns, self.asked, self.begun = list(turns), [], []

    def __call__(self, rows: list[int], noise: Varied, beginnings: list[str]) -> list[str]:
        self.asked.append((rows, noise.seed, noise.count))
        self.begun.append(beginnings[::SAMPLES])
        assert beginnings == [one for one in self.begun[-1] for _ in range(SAMPLES)]
        texts = self.turns.pop(0) if self.turns else []
        return texts + [""] * (len(rows) - len(texts))

    def choose(self, first: list[str], said: list, language: str | None = "zh") -> list[str]:
        return closest_reports(first, said, NAMES, language, str, self)


def test_only_what_deviates_is_written_again_and_only_until_it_does_not() -> None:
    wrong, near = "所见：未见异常。", "所见：右上肺野见结节，直径约12mm。"
    pen = Pen([wrong, RIGHT, near])
    assert pen.choose([RIGHT, wrong, wrong], [SAID, SAID, None]) == [RIGHT, RIGHT, wrong]
    assert pen.asked == [([1] * SAMPLES, 0, SAMPLES)]
    pen = Pen([wrong, near], [wrong])
    assert pen.choose([wrong], [SAID]) == [near], "no later turn brought it closer"
    assert [seed for _, seed, _ in pen.asked] == list(range(TURNS))
    assert Pen().choose([wrong], [SAID], language=None) == [wrong]


def test_a_report_is_gone_on_from_where_one_was_right_furthest() -> None:
    """Also from a text whose end makes it no better than the chosen one; a denial is no way forward."""
    first, second = RIGHT.split("左侧")[0], RIGHT.split("结论")[0]
    wrong = f"{first}右下肺野见结节，直径约9mm。右下肺野见结节，直径约7mm。右下肺野见结节，直径约5mm。"
    pen = Pen([wrong], [f"{second}结论：左肺结节。", wrong], [RIGHT])
    assert pen.choose(["所见：两肺未见异常。"], [SAID]) == [RIGHT]
    assert pen.begun == [[""], [first], [second]]


@pytest.mark.parametrize(
    ("report", "right"),
    [
        (RIGHT.replace("。结论：", "。左下肺野见结节，直径约9mm。结论："), RIGHT.split("结论")[0]),
        (RIGHT.replace("结论：右", "结论：左"), RIGHT.split("结论")[0]),
        (RIGHT.replace("左侧胸腔积液，深约20mm。结论", "结论"), RIGHT.split("左侧")[0]),  # it concludes too early
        (RIGHT.replace("深约", INCOMPLETE), RIGHT.split("左侧")[0]),
        ("右上肺野见结节，直径约12mm。", ""),  # nothing is wrong in it but what is missing, and it has no impression
        ("Findings: right upper zone nodule, 9 mm. Impression: nodule.", ""),
    ],
)
def test_the_right_beginning_of_a_report(report: str, right: str) -> None:
    assert right_beginning(report, SAID, NAMES, "en" if report.isascii() else "zh") == right


def test_a_few_prompts_are_written_again_at_a_time() -> None:
    pen = Pen([], [RIGHT], [RIGHT], [])
    assert pen.choose([""] * 5, [SAID] * 5) == [RIGHT, "", "", "", RIGHT], "the fifth in the first turn"
    first, last = [row for row in range(AT_ONCE) for _ in range(SAMPLES)], [AT_ONCE] * SAMPLES
    assert pen.asked[:3] == [(first, 0, SAMPLES), (last, 0, SAMPLES), (first, 1, SAMPLES)]
    assert pen.asked[3:] == [(first[SAMPLES:], turn, SAMPLES) for turn in range(2, TURNS)]


def test_of_equally_close_reports_the_first_whole_one_is_chosen() -> None:
    wrong, other = "所见：未见异常。", RIGHT.replace("见结节", "可见结节")
    assert Pen([other, RIGHT]).choose([wrong], [SAID]) == [other]
    broken = RIGHT.replace("直径", INCOMPLETE)
    assert Pen([broken, RIGHT]).choose([wrong], [SAID]) == [RIGHT]
    assert Pen([RIGHT]).choose([broken], [SAID]) == [RIGHT], "a broken character is written again too"


def test_a_doubtful_lesion_has_the_size_that_it_would_be_said_with(head: FindingsHead) -> None:
    found, measured = says(lesions=((FALSE, 0.6, 2.0),)), [SizedTable(1).lesions[0]]
    said = believed(head, found, measured, "both")
    assert said == [] and points(doubtful(head, found, measured, said))[0][-1] == 30


def test_a_head_that_these_reports_cannot_teach_goes() -> None:
    loaders = [SimpleNamespace(dataset=table([], language=None)) for _ in range(2)]
    vision = torch.nn.Module()
    vision.head, vision.add_head = (
        FindingsHead(NAMES, 8, DESCRIPTORS, width=16),
        lambda names: setattr(vision, "head", None),
    )
    assert set_up_findings(Accelerator(cpu=True), vision, *loaders, "both") == "off" and vision.head is None
