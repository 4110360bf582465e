"""Names of columns, in Chinese and English.

Case, spaces, underscores, hyphens and text in brackets are ignored. Where several columns have one role, the first
alias in this list is used.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

ALIASES: dict[str, tuple[str, ...]] = {
    "image_path": (
        "image_path", "image", "img", "image_file", "img_path", "ct_path", "ct", "volume", "volumename", "nifti", "nii",
        "scan", "影像路径", "图像路径", "影像文件", "图像文件", "影像", "图像", "CT路径", "文件路径", "路径", "文件名",
        "file_path", "file", "filename", "path",
    ),
    "id": (
        "影像号", "检查号", "影像编号", "检查编号", "accession_number", "accession", "study_id", "image_id", "case_id",
        "case", "病例号", "病例编号", "id", "编号", "序号",
    ),
    "mask_path": (
        "mask_path", "mask", "segmentation", "seg", "label_path", "掩膜路径", "掩膜", "标注路径", "标注", "分割路径",
        "分割", "病灶标注",
    ),
    "question": ("question", "prompt", "instruction", "query", "问题", "提问"),
    "answer": (
        "answer", "report", "caption", "response", "text", "报告", "报告内容", "报告全文", "影像报告", "诊断报告",
        "检查报告", "答案",
    ),
    "findings": (
        "findings", "finding", "findings_en", "所见", "影像所见", "检查所见", "影像学所见", "影像表现", "影像学表现",
        "影像描述", "CT所见", "CT表现", "描述",
    ),
    "impression": (
        "impression", "impressions", "impressions_en", "conclusion", "结论", "诊断结论", "检查结论", "印象", "诊断印象",
        "诊断意见", "影像诊断", "影像学诊断", "诊断", "诊断提示", "影像提示", "提示",
    ),
    "recommendation": ("recommendation", "recommendations", "advice", "建议", "随访建议"),
    "tendency": ("pathology_tendency", "病理倾向"),
    "patient": (
        "patient", "patient_id", "subject", "subject_id", "患者", "患者编号", "患者ID", "患者号", "病人", "病人编号",
        "病人ID", "住院号", "门诊号", "登记号",
    ),
}  # fmt: skip


def find_columns(columns: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The column of each role, and a note for every alias and every column that is not used."""
    by_key = {_key(name): name for name in reversed(columns)}
    chosen: dict[str, str] = {}
    notes = []
    for role, aliases in ALIASES.items():
        found = [by_key[key] for key in dict.fromkeys(map(_key, aliases)) if key in by_key]
        if not found:
            continue
        chosen[role] = found[0]
        if found[0] != role:
            notes.append(f"column '{found[0]}' is taken as {role}")
        if len(found) > 1:
            notes.append(f"columns {', '.join(map(repr, found[1:]))} are not used: '{found[0]}' is {role}")
    return chosen, notes


def _key(name: str) -> str:
    text = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\s_\-]+|\(.*?\)|\[.*?\]|【.*?】", "", text)
