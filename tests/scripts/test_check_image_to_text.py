"""The one-image check from end to end on a random model: one path or the other, the same text comes out."""

from __future__ import annotations

import gc
import json
import logging
import re
import shutil
import sys
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from config.errors import InputError
from config.nnunet_plans import PreprocessPlan
from config.schema import load_config
from config.toy_models import STAMP
from engine.checkpoint import Checkpoint, save_checkpoint
from engine.findings_prompt import SAMPLES
from engine.reporting import token_budget
from engine.scan_checks import NOTICES
from models.language_model.decoding import CharacterStream, Varied
from models.language_model.identity import lm_identity
from models.language_model.mamba_lm import MambaLM
from models.language_model.prefix_state import PrefixState
from models.medical_vlm import VisionBridge
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.encoder import NnUNetEncoder
from models.nnunet.unet import SegmentationUNet
from models.vim_bridge import grid_side
from scripts.check_image_to_text import main
from tests.models.language_model.tiny import byte_tokenizer, sharp_lm

TWO = ["--question", "肺部有无病变？", "--question", "q"]
SMALL = {"bridge_width": 8, "bridge_depth": 1, "encoder_target_spatial": 4, "max_visual_tokens": 16, "slices": 1}
NO_TABLES = {"caption_csv_train": None, "caption_csv_val": None}
LESION = {"slice_policy": "nnunet", "slices": 2, "roi_side": 2, "roi_policy": "lesion"}


def write_language_model(folder: Path, seed: int = 0, width: int = 32) -> None:
    size = {"vocab_size": 257, "hidden_size": width, "num_hidden_layers": 2, "tie_word_embeddings": True}
    lm = sharp_lm(byte_tokenizer(pad_token=None), seed=seed, sharpness=1, **size)
    lm.tokenizer.save_pretrained(folder)
    lm.model.save_pretrained(folder)


def write_checkpoint(root: Path, name: str, **keys: object) -> None:
    network = root / "checkpoint_best.pth"
    paths = {"mamba_model": root / "lm", "cache_dir": root / "cache", "caption_prompt_json": root / "prompts.json"}
    paths = {key: str(path) for key, path in {**paths, "nnunet_encoder_checkpoint": network}.items()}
    config = load_config(None, **{**SMALL, **NO_TABLES, **paths, **keys})
    source = load_nnunet_checkpoint(network)
    torch.manual_seed(1)
    encoder = NnUNetEncoder.from_checkpoint(source, target_spatial=4, planes=config.slices)
    vision = VisionBridge.build(config, encoder, 32, 0.5, with_cmi=config.use_cmi)
    diagnostics = {"token_std": 0.5, "image_std": 0.5, "effective_rank": 3.0, "expected_std": 0.5, "collapsed": False}
    run = {"stage": "vlm", "step": 1, "epoch": 1, "val_loss": 1.0, "config": config, "diagnostics": diagnostics}
    plan = PreprocessPlan.from_nnunet(source.plans, source.configuration)
    save_checkpoint(root / f"{name}.pt", vision, plan=plan, llm=lm_identity(config.mamba_model).to_dict(), **run)


@pytest.fixture(scope="module")
def desk(tmp_path_factory, assets) -> Path:
    """A folder with a language model, two images and checkpoints."""
    root = tmp_path_factory.mktemp("desk")
    write_language_model(root / "lm")
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        voxels = rng.normal(-600, 300, (48, 48, 6)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([4.0, 4.0, 8.0, 1.0])), root / f"{name}.nii.gz")
    (root / "prompts.json").write_text(json.dumps({"caption_prompt": ["请描述。"]}), encoding="utf-8")
    shutil.copy(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth", root)
    write_checkpoint(root, "plain")
    write_checkpoint(root, "cmi", use_cmi=True)
    write_checkpoint(root, "lesion", **LESION)
    write_checkpoint(root, "masked", **{**LESION, "slice_policy": "mask"})
    return root


@pytest.fixture
def check(desk, monkeypatch, capsys):
    """Runs the script's main; returns what it printed."""

    def run(*flags: str, checkpoint: str = "plain", image: str | None = "one") -> str:
        command = ["check", "--checkpoint", str(desk / f"{checkpoint}.pt"), "--max_new_tokens", "24"]
        command += ["--image", str(desk / f"{image}.nii.gz")] if image else []
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        main()
        return capsys.readouterr().out

    return run


def texts(printed: str) -> list[str]:
    return re.findall(r"(?ms)^生成文本: (.*?)^(?:note: the text ends|time to first token)", printed)


def one_by_one(check, *flags: str, **options: str) -> list[str]:
    """The answers to the two questions, each asked in a run of its own."""
    return [text for i in (0, 2) for text in texts(check(*TWO[i : i + 2], *flags, **options))]


def test_one_question_prints_the_promised_lines(check):
    printed = check()
    order = ("输入图像: ", "slices read: 4 of 6", "问题: 请描述。\n生成文本: ")
    places = [printed.index(words) for words in order]
    assert places == sorted(places) and "one.nii.gz" in printed[places[0] : places[1]]
    assert re.search(r"^time to first token: \d+\.\d\d s \(the image read with the question\)$", printed, re.MULTILINE)
    assert "image state" not in printed
    whole, parts = re.fullmatch(r"time: ([\d.]+) s = (.*)", printed.splitlines()[-1]).groups()
    assert re.sub(r"\d+\.\d{3}", "#", parts) == "start # + image # + language model # + text #"
    assert float(whole) == pytest.approx(sum(map(float, re.findall(r"[\d.]+", parts))), abs=0.003)


def test_several_questions_read_the_image_once_and_say_the_same(desk, check, monkeypatch):
    alone = one_by_one(check)
    read, reads = PrefixState.read, []
    monkeypatch.setattr(PrefixState, "read", lambda *given: reads.append(1) or read(*given))
    printed = check(*TWO)
    assert texts(printed) == alone and alone[0] != alone[1] and len(reads) == 1
    assert "image state: 0.0 MB, whatever the number of visual tokens (here 16)" in printed
    assert "s of it for the image)" in printed and "(the image's state reused)" in printed


def test_a_saved_state_answers_without_image_or_vision(desk, check, monkeypatch, tmp_path):
    state, blind = tmp_path / "states" / "one.safetensors", tmp_path / "blind.safetensors"
    check("--save_prefix", str(blind), checkpoint="masked")
    expected = texts(check(*TWO, "--save_prefix", str(state)))
    monkeypatch.setattr(Checkpoint, "build_vision", None)
    printed = check("--prefix", str(state), *TWO, image=None)
    assert texts(printed) == expected and re.search(r"(?m)^输入图像: .*one\.nii\.gz$", printed)
    assert texts(check("--prefix", str(state), *TWO)) == expected  # the right image may be named
    assert NOTICES["blind"]["zh"] in texts(check("--prefix", str(blind), checkpoint="masked", image=None))[0]
    with pytest.raises(InputError, match="another image"):
        check("--prefix", str(state), image="two")


def test_a_state_of_another_checkpoint_or_model_is_refused(desk, check, tmp_path):
    state = tmp_path / "one.safetensors"
    check("--save_prefix", str(state))
    with pytest.raises(InputError, match="another vision checkpoint"):
        check("--prefix", str(state), checkpoint="cmi", image=None)
    write_language_model(desk / "lm", seed=1)
    try:
        with pytest.raises(InputError, match="other weights or another precision of the language model"):
            check("--prefix", str(state), image=None)
    finally:
        write_language_model(desk / "lm")


def test_a_corrected_findings_prompt_changes_the_text(desk, check, tmp_path):
    """The checkpoint's training had prompts in a language that its file does not name: only a corrected one is used."""
    plain, state = check(), tmp_path / "one.safetensors"
    assert "findings prompt" not in plain
    corrected = check("--findings", "左肺下野 肿块，30毫米", "--save_prefix", str(state))
    assert "findings prompt (corrected by --findings): 已知：左肺下野肿块30mm。\n问题: " in corrected
    assert texts(corrected) != texts(plain)
    assert "已知：未见病灶。" in check("--findings", "")
    kept = check("--prefix", str(state), image=None)
    assert "findings prompt (both): 已知：左肺下野肿块30mm。" in kept and texts(kept) == texts(corrected)
    again = check("--prefix", str(state), "--findings", "右肺上野结节8mm", image=None)
    assert "corrected by --findings): 已知：右肺上野结节8mm。" in again and texts(again) != texts(corrected)


@pytest.mark.parametrize("prefix", [False, True], ids=["image", "state"])
def test_a_text_that_does_not_state_its_prompt_is_written_again(check, monkeypatch, tmp_path, prefix):
    """The random model's text never states it, and ends only by a stop string."""
    asked = ["--findings", "右肺上野结节8mm"]
    [whole] = texts(check(*asked, "--save_prefix", str(tmp_path / "state")))
    k = next(k for k in range(3, len(whole)) if whole[k].isalnum() and whole[k] not in whole[:k])
    ends, calls = [*asked, "--stop", whole[k]], []

    def closest(reports, said, kinds, language, text_of, write):
        calls.append((reports, [point.finding for point in said[0]], language))
        again = write([0] * SAMPLES, Varied(SAMPLES, (9.0, 9.0)), ["所见："] * SAMPLES)
        assert all(text.startswith("所见：") for text in again)
        return again[-1:]

    monkeypatch.setattr("scripts.check_image_to_text.closest_reports", closest)
    source = {"image": None} if prefix else {}
    ends += ["--prefix", str(tmp_path / "state")] if prefix else []
    printed = check(*ends, **source)
    assert calls == [([whole[:k]], ["nodule"], "zh")]
    assert "\nnote: the first text did not state its findings prompt; this is the closest of several\n" in printed
    streamed = check(*ends, "--stream", **source)
    note = "note: this text does not state its findings prompt; the closest of several more:"
    first, again = streamed.split("生成文本: ")[1].split("time to first token")[0].split(f"\n{note}\n")
    assert first == whole[:k] and again.startswith(printed.split("生成文本: ")[1].split("\nnote")[0])
    for left in (
        [*asked],
        [*ends, "--question", "有无病变？"],
        [*ends, "--temperature", "1"],
        [*ends, "--num_beams", "2"],
    ):
        assert "did not state" not in check(*left, **({} if left == asked else source))
    assert len(calls) == 2, "not where it was cut, nor for a question or a way of decoding of one's own"


def test_a_findings_prompt_that_cannot_be_used_is_refused_in_one_line(desk, check, monkeypatch):
    monkeypatch.setattr(MambaLM, "load", None)  # before the language model is loaded
    with pytest.raises(InputError, match=r"^'左肺怪物' names no known finding; known are: 结节, "):
        check("--findings", "右肺上野结节8mm；左肺怪物")
    write_checkpoint(desk, "unprompted", findings_prompt="off")
    with pytest.raises(InputError, match=r"^--findings: .*unprompted\.pt was trained without findings prompts"):
        check("--findings", "右肺上野结节8mm", checkpoint="unprompted")


def test_cmi_reads_the_image_for_each_question(check, tmp_path):
    printed = check(*TWO, checkpoint="cmi")
    assert "with CMI the visual tokens depend on the question" in printed and "image state" not in printed
    assert texts(printed) == one_by_one(check, checkpoint="cmi")
    with pytest.raises(InputError, match="--save_prefix.*CMI"):
        check("--save_prefix", str(tmp_path / "a.safetensors"), checkpoint="cmi")


def test_nnunet_finds_the_slices_of_a_new_scan_and_its_file_is_needed(desk, check, monkeypatch):
    printed = check(checkpoint="lesion")
    assert texts(printed)[0] and "no lesion in the segmentation" in printed and "【系统提示】" not in printed
    assert len(list((desk / "cache" / "segmentation").glob("*/mask.bin"))) == 1
    assert "without knowing of a lesion" in (blind := check(checkpoint="masked"))
    assert texts(blind)[0].startswith(NOTICES["blind"]["zh"] + "\n")
    switched = check("--slice_policy", "nnunet", checkpoint="masked")
    assert "note: slice_policy nnunet; the checkpoint was trained with mask" in switched
    assert "【系统提示】" not in switched
    hidden = (desk / "checkpoint_best.pth").rename(desk / "hidden.pth")
    try:
        with pytest.raises(InputError, match="slice_policy is nnunet"):
            check(checkpoint="lesion")
    finally:
        hidden.rename(desk / "checkpoint_best.pth")


@pytest.mark.parametrize(("propagate", "lines"), [(False, 2), (True, 3)])  # transformers propagates under CI=true
def test_streaming_prints_the_same_text_with_no_log_line_inside(check, monkeypatch, propagate, lines):
    """On a console, logs and text share one screen."""
    [text] = texts(check("--question", "q"))
    put, spoken = CharacterStream.put, ["models.selective_scan", "transformers.generation"]

    def put_and_log(*given: object) -> None:
        put(*given)
        while spoken:
            logging.getLogger(spoken.pop()).warning("a log line")
            warnings.warn("a Python warning", stacklevel=1)

    monkeypatch.setattr(CharacterStream, "put", put_and_log)
    handler = logging.StreamHandler(sys.stdout)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", propagate)
    printed = check("--question", "q", "--stream")
    assert f"生成文本: {text}" in printed
    after = printed.partition(text)[2]
    assert after.count("a log line") == lines and "a Python warning" in after
    assert logging.getLogger().handlers == [handler]


@pytest.mark.parametrize(
    ("keys", "wanted", "cap", "tokens", "reason"),
    [
        ({}, None, None, 64, ""),
        ({}, None, 32, 32, "the GPU cap of 32 (--max_visual_tokens overrides it)"),
        ({}, 48, 32, 48, "--max_visual_tokens"),
        ({}, 64, 32, 64, ""),
        ({"max_visual_tokens": 16}, None, 32, 16, ""),
        ({"roi_side": 7}, None, 32, 32, "the GPU cap of 32 "),
        ({"roi_side": 7, "roi_policy": "lesion"}, None, 32, 50, "raised to what 1 slice(s) and their RoI need"),
        ({"roi_side": 5, "roi_policy": "lesion"}, None, 32, 32, "the GPU cap of 32 "),
        ({"roi_side": 5, "roi_policy": "lesion", "slices": 2}, None, 32, 52, "raised to what 2 slice(s)"),
        ({"slices": 40}, None, 32, 40, "raised to what 40 slice(s)"),
    ],
)
def test_the_gpu_cap_leaves_room_for_slices_and_roi(keys, wanted, cap, tokens, reason):
    config = load_config(None, **{"slices": 1, **keys})
    found, why = token_budget(config, wanted, cap)
    assert found == tokens and reason in why and bool(why) == bool(reason)
    local = config.roi_side**2 if config.roi_policy == "lesion" else 0
    assert grid_side(found, config.slices, 28, local) >= 1


def test_the_vision_part_is_freed_before_the_language_model_is_loaded(check, monkeypatch):
    def parts(others: list[nn.Module]) -> list[nn.Module]:
        found = [part for part in gc.get_objects() if type(part) in (VisionBridge, SegmentationUNet)]
        return [part for part in found if all(part is not other for other in others)]

    load, alive, before = MambaLM.load, [], parts([])  # other tests'

    def count_and_load(*given: object, **named: object) -> MambaLM:
        alive.append(parts(before))
        return load(*given, **named)

    monkeypatch.setattr(MambaLM, "load", count_and_load)
    check(checkpoint="lesion")
    assert alive == [[]]


def test_another_language_model_of_the_same_width_is_noted_and_of_another_refused(desk, check, tmp_path):
    write_language_model(tmp_path / "twin", seed=1)
    flags = ["--mamba_model", str(tmp_path / "twin")]
    assert f"note: language model {tmp_path / 'twin'}; the checkpoint was trained with {desk / 'lm'}" in check(*flags)
    write_language_model(tmp_path / "twin", width=16)
    with pytest.raises(InputError, match="has width 16, .* was trained for width 32"):
        check(*flags)


def test_a_toy_language_model_does_not_read_a_patients_scan(check, tmp_path):
    write_language_model(tmp_path / "toy")
    described = json.loads((tmp_path / "toy" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "toy" / "config.json").write_text(json.dumps({**described, STAMP: True}), encoding="utf-8")
    flags = ["--mamba_model", str(tmp_path / "toy")]
    with pytest.raises(InputError, match="mamba_model .* use a checkpoint that was trained with your own models"):
        check(*flags)
    assert "warning: mamba_model" in check(*flags, "--allow_toy_model")


def test_sampling_takes_its_seed(check):
    asked = [*TWO[2:], "--temperature", "1", "--seed"]
    drawn = texts(check(*asked, "1"))
    assert drawn == texts(check(*asked, "1")) != texts(check(*asked, "2"))
    assert texts(check(*TWO[:2], *asked, "1"))[1:] == drawn, "a question asked before changes nothing"


def test_beams_from_the_state_as_from_the_image(check):
    beams = ["--num_beams", "3", "--repetition_penalty", "1.2"]
    assert texts(check(*TWO, *beams)) == one_by_one(check, *beams)


def test_stop_cuts(check):
    [whole] = texts(check())
    string = whole[3:5]
    assert texts(check("--stop", string)) == [whole[: whole.index(string)] + "\n"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num_beams", "2", "--stream"], "--stream"),
        (["--top_p", "0.5"], "--top_p"),
        (["--temperature", "-1"], "--temperature"),
        (["--stop", ""], "--stop"),
        (["--question", ""], "--question"),
        (["--image", "nowhere.nii.gz"], "--image not found"),
        (["--prefix", "a", "--save_prefix", "b"], "--save_prefix"),
        (["--prefix", "a", "--max_visual_tokens", "9"], "--max_visual_tokens"),
        (["--prefix", "a", "--mask", "m.nii.gz"], "--mask"),
        (["--prefix", "a", "--index", "1"], "--index"),
        (["--prefix", "nowhere.safetensors"], "not found"),
        (["--save_prefix", "."], "--save_prefix"),
    ],
)
def test_flags_that_cannot_be_are_one_line(check, flags, named):
    with pytest.raises(InputError, match=re.escape(named)) as error:
        check(*flags, image=None)
    assert "\n" not in str(error.value)
