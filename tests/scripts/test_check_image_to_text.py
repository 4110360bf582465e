"""The one-image check from end to end on a random model: one path or the other, the same text comes out."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from config.errors import InputError
from config.nnunet_plans import PreprocessPlan
from config.schema import load_config
from config.toy_models import STAMP
from engine.checkpoint import Checkpoint, save_checkpoint
from models.language_model.decoding import CharacterStream
from models.language_model.mamba_lm import MambaLM, lm_identity
from models.language_model.prefix_state import PrefixState
from models.medical_vlm import VisionBridge
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.encoder import NnUNetEncoder
from models.nnunet.unet import SegmentationUNet
from models.vim_bridge import grid_side
from scripts.check_image_to_text import token_budget

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_image_to_text.py"
TWO = ["--question", "肺部有无病变？", "--question", "q"]


def write_language_model(folder: Path, seed: int = 0, width: int = 32) -> None:
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(seed)
    model = MambaForCausalLM(MambaConfig(vocab_size=257, hidden_size=width, num_hidden_layers=2, state_size=8))
    with torch.no_grad():
        for layer in model.backbone.layers:  # as drawn, a random model hardly remembers what it read
            for part in (layer.mixer.in_proj, layer.mixer.x_proj, layer.mixer.conv1d):
                part.weight.mul_(3)
    model.save_pretrained(folder)


class Desk:
    """A folder with a language model, two images and checkpoints, and the script run on them."""

    def __init__(self, root: Path, assets: Path, script: ModuleType) -> None:
        self.root, self.script = root, script
        self.lm = root / "lm"
        write_language_model(self.lm)
        rng = np.random.default_rng(0)
        for name in ("one", "two"):
            voxels = rng.normal(-600, 300, (48, 48, 6)).astype(np.int16)
            nib.save(nib.Nifti1Image(voxels, np.diag([4.0, 4.0, 8.0, 1.0])), root / f"{name}.nii.gz")
        (root / "prompts.json").write_text(json.dumps({"caption_prompt": ["请描述。"]}), encoding="utf-8")
        self.network = root / "checkpoint_best.pth"
        shutil.copy(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth", self.network)
        for name, with_cmi in (("plain", False), ("cmi", True)):
            self._write_checkpoint(root / f"{name}.pt", with_cmi=with_cmi)
        lesion = {"slice_policy": "nnunet", "slices": 2, "roi_side": 2, "roi_policy": "lesion"}
        self._write_checkpoint(root / "lesion.pt", with_cmi=False, **lesion)
        self._write_checkpoint(root / "masked.pt", with_cmi=False, **{**lesion, "slice_policy": "mask"})

    def _write_checkpoint(self, path: Path, *, with_cmi: bool, **keys: object) -> None:
        source = load_nnunet_checkpoint(self.network)
        config = load_config(
            None, bridge_width=8, bridge_depth=1, encoder_target_spatial=4, max_visual_tokens=16, use_cmi=with_cmi,
            mamba_model=str(self.lm), cache_dir=str(self.root / "cache"), caption_csv_train=None, caption_csv_val=None,
            caption_prompt_json=str(self.root / "prompts.json"), nnunet_encoder_checkpoint=str(self.network), **keys,
        )  # fmt: skip
        torch.manual_seed(1)
        encoder = NnUNetEncoder.from_checkpoint(source, target_spatial=4, planes=config.slices)
        vision = VisionBridge.build(config, encoder, 32, 0.5, with_cmi=with_cmi)
        diagnostics = {"token_std": 0.5, "image_std": 0.5, "effective_rank": 3.0, "expected_std": 0.5}
        save_checkpoint(
            path, vision, stage="vlm", step=1, epoch=1, val_loss=1.0, config=config,
            plan=PreprocessPlan.from_nnunet(source.plans, source.configuration),
            llm=lm_identity(str(self.lm)).to_dict(), diagnostics={**diagnostics, "collapsed": False},
        )  # fmt: skip

    @property
    def one(self) -> list[str]:
        return ["--image", str(self.root / "one.nii.gz")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Desk:
    spec = importlib.util.spec_from_file_location("check_image_to_text", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    return Desk(tmp_path_factory.mktemp("desk"), assets, script)


@pytest.fixture
def check(desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the script's main; returns what it printed."""

    def run(*flags: str, checkpoint: str = "plain") -> str:
        command = [str(SCRIPT), "--checkpoint", str(desk.root / f"{checkpoint}.pt"), "--max_new_tokens", "24", *flags]
        monkeypatch.setattr(sys, "argv", command)
        desk.script.main()
        return capsys.readouterr().out

    return run


def texts(printed: str) -> list[str]:
    return re.findall(
        r"^生成文本: (.*?)^(?:note: the text ends|time to first token)", printed, re.DOTALL | re.MULTILINE
    )


def test_one_question_prints_the_promised_lines(desk: Desk, check: Callable[..., str]) -> None:
    printed = check(*desk.one)
    assert re.search(r"^输入图像: .*one\.nii\.gz\n问题: 请描述。\n生成文本: ", printed, re.MULTILINE)
    assert re.search(r"^time to first token: \d+\.\d\d s \(the image read with the question\)$", printed, re.MULTILINE)
    assert "image state" not in printed


def test_several_questions_read_the_image_once_and_say_the_same(
    desk: Desk, check: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [texts(check(*desk.one, *TWO[i : i + 2]))[0] for i in (0, 2)]
    reads = []
    read = PrefixState.read
    monkeypatch.setattr(PrefixState, "read", lambda *given: reads.append(1) or read(*given))
    printed = check(*desk.one, *TWO)
    assert texts(printed) == alone and alone[0] != alone[1]
    assert len(reads) == 1
    assert "image state: 0.0 MB, whatever the number of visual tokens (here 16)" in printed
    assert "s of it for the image)" in printed and "(the image's state reused)" in printed


def test_a_saved_state_answers_without_image_or_vision(
    desk: Desk, check: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = tmp_path / "states" / "one.safetensors"
    expected = texts(check(*desk.one, *TWO, "--save_prefix", str(state)))

    def no_vision(*_: object) -> None:
        raise AssertionError("the vision part was built")

    monkeypatch.setattr(Checkpoint, "build_vision", no_vision)
    printed = check("--prefix", str(state), *TWO)
    assert texts(printed) == expected
    assert re.search(r"^输入图像: .*one\.nii\.gz$", printed, re.MULTILINE)
    assert texts(check("--prefix", str(state), *TWO, *desk.one)) == expected  # the right image may be named
    with pytest.raises(InputError, match="another image"):
        check("--prefix", str(state), "--image", str(desk.root / "two.nii.gz"))


def test_a_state_of_another_checkpoint_or_model_is_refused(
    desk: Desk, check: Callable[..., str], tmp_path: Path
) -> None:
    state = tmp_path / "one.safetensors"
    check(*desk.one, "--save_prefix", str(state))
    with pytest.raises(InputError, match="another vision checkpoint"):
        check("--prefix", str(state), checkpoint="cmi")
    write_language_model(desk.lm, seed=1)
    try:
        with pytest.raises(InputError, match="other weights or another precision of the language model"):
            check("--prefix", str(state))
    finally:
        write_language_model(desk.lm)


def test_cmi_reads_the_image_for_each_question(desk: Desk, check: Callable[..., str], tmp_path: Path) -> None:
    printed = check(*desk.one, *TWO, checkpoint="cmi")
    assert "with CMI the visual tokens depend on the question" in printed and "image state" not in printed
    alone = [texts(check(*desk.one, *TWO[i : i + 2], checkpoint="cmi"))[0] for i in (0, 2)]
    assert texts(printed) == alone
    with pytest.raises(InputError, match="--save_prefix.*CMI"):
        check(*desk.one, "--save_prefix", str(tmp_path / "a.safetensors"), checkpoint="cmi")


def test_nnunet_finds_the_slices_of_a_new_scan_and_its_file_is_needed(
    desk: Desk, check: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = check(*desk.one, checkpoint="lesion")
    assert texts(printed)[0] and "no lesion" not in printed
    assert len(list((desk.root / "cache" / "segmentation").glob("*/mask.bin"))) == 1
    assert "tokens around it look at the centre" in check(*desk.one, checkpoint="masked")
    hidden = desk.network.with_suffix(".away")
    desk.network.rename(hidden)
    try:
        with pytest.raises(InputError, match="slice_policy is nnunet"):
            check(*desk.one, checkpoint="lesion")
    finally:
        hidden.rename(desk.network)


def test_streaming_prints_the_same_text_with_no_log_line_inside(
    desk: Desk, check: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a console, logs and text share one screen."""
    expected = texts(check(*desk.one, "--question", "q"))
    put = CharacterStream.put
    spoken = ["models.selective_scan", "transformers.generation"]

    def put_and_log(*given: object) -> None:
        put(*given)
        while spoken:
            logging.getLogger(spoken.pop()).warning("a log line")
            warnings.warn("a Python warning", stacklevel=1)

    monkeypatch.setattr(CharacterStream, "put", put_and_log)
    handler = logging.StreamHandler(sys.stdout)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    printed = check(*desk.one, "--question", "q", "--stream")
    [text] = expected
    assert f"生成文本: {text}" in printed
    after = printed.partition(text)[2]
    assert after.count("a log line") == 2 and "a Python warning" in after
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
def test_the_gpu_cap_leaves_room_for_slices_and_roi(
    keys: dict, wanted: int | None, cap: int | None, tokens: int, reason: str
) -> None:
    config = load_config(None, **keys)
    found, why = token_budget(config, wanted, cap)
    assert found == tokens and reason in why and bool(why) == bool(reason)
    local = config.roi_side**2 if config.roi_policy == "lesion" else 0
    assert grid_side(found, config.slices, 28, local) >= 1


def test_the_vision_part_is_freed_before_the_language_model_is_loaded(
    desk: Desk, check: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, alive = MambaLM.load, []

    def count_and_load(*given: object, **named: object) -> MambaLM:
        alive.append([part for part in gc.get_objects() if type(part) in (VisionBridge, SegmentationUNet)])
        return load(*given, **named)

    monkeypatch.setattr(MambaLM, "load", count_and_load)
    check(*desk.one, checkpoint="lesion")
    assert alive == [[]]


def test_another_language_model_of_the_same_width_is_noted_and_of_another_refused(
    desk: Desk, check: Callable[..., str], tmp_path: Path
) -> None:
    write_language_model(tmp_path / "twin", seed=1)
    flags = [*desk.one, "--mamba_model", str(tmp_path / "twin")]
    assert f"note: language model {tmp_path / 'twin'}; the checkpoint was trained with {desk.lm}" in check(*flags)
    write_language_model(tmp_path / "twin", width=16)
    with pytest.raises(InputError, match="has width 16, .* was trained for width 32"):
        check(*flags)


def test_a_toy_language_model_does_not_read_a_patients_scan(
    desk: Desk, check: Callable[..., str], tmp_path: Path
) -> None:
    write_language_model(tmp_path / "toy")
    described = json.loads((tmp_path / "toy" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "toy" / "config.json").write_text(json.dumps({**described, STAMP: True}), encoding="utf-8")
    flags = [*desk.one, "--mamba_model", str(tmp_path / "toy")]
    with pytest.raises(InputError, match="mamba_model .* use a checkpoint that was trained with your own models"):
        check(*flags)
    assert "warning: mamba_model" in check(*flags, "--allow_toy_model")


def test_sampling_takes_its_seed(desk: Desk, check: Callable[..., str]) -> None:
    flags = [*desk.one, "--question", "q", "--temperature", "1"]
    assert texts(check(*flags, "--seed", "1")) == texts(check(*flags, "--seed", "1"))
    assert texts(check(*flags, "--seed", "1")) != texts(check(*flags, "--seed", "2"))
    # What was asked before changes nothing.
    assert texts(check(*flags[:2], *TWO, "--temperature", "1", "--seed", "1"))[1:] == texts(
        check(*flags, "--seed", "1")
    )


def test_beams_from_the_state_as_from_the_image(desk: Desk, check: Callable[..., str]) -> None:
    both = texts(check(*desk.one, *TWO, "--num_beams", "3", "--repetition_penalty", "1.2"))
    for number, i in enumerate((0, 2)):
        assert both[number : number + 1] == texts(
            check(*desk.one, *TWO[i : i + 2], "--num_beams", "3", "--repetition_penalty", "1.2")
        )


def test_stop_cuts(desk: Desk, check: Callable[..., str]) -> None:
    [whole] = texts(check(*desk.one))
    string = whole[3:5]
    assert texts(check(*desk.one, "--stop", string)) == [whole[: whole.index(string)] + "\n"]


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
def test_flags_that_cannot_be_are_one_line(check: Callable[..., str], flags: list[str], named: str) -> None:
    with pytest.raises(InputError, match=re.escape(named)) as error:
        check(*flags)
    assert "\n" not in str(error.value)
