"""Checkpoints: what is saved comes back bit for bit, and everything else is refused in one clear line."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from config.errors import InputError
from config.nnunet_plans import PreprocessPlan
from config.schema import REMOVED, Config, build_config
from data.findings import DESCRIPTORS
from engine import checkpoint as checkpoint_module
from engine.checkpoint import (
    Checkpoint,
    check_agreement,
    load_checkpoint,
    load_vision_weights,
    read_torch_file,
    save_checkpoint,
)
from models import pretrained
from models.medical_vlm import VisionBridge
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.encoder import NnUNetEncoder

Source = tuple[Path, PreprocessPlan]
LLM_WIDTH = 24
DIAGNOSTICS = {"token_std": 0.1, "image_std": 0.05, "effective_rank": 9.0, "expected_std": 0.1, "collapsed": False}


@pytest.fixture(scope="module")
def source(assets: Path) -> Source:
    path = assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth"
    nnunet = load_nnunet_checkpoint(path)
    return path, PreprocessPlan.from_nnunet(nnunet.plans, nnunet.configuration)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """The language model that a configuration names has the width of the checkpoints."""
    monkeypatch.setattr("engine.checkpoint.read_lm_config", lambda name: SimpleNamespace(hidden_size=LLM_WIDTH))


def configuration(**changes: object) -> Config:
    values = {"slices": 1, "encoder_target_spatial": 6, "bridge_width": 16, "bridge_depth": 1, "max_visual_tokens": 9}
    return build_config({**values, **changes}, "test")


def vision_of(source: Source, config: Config, *, with_cmi=False, width=LLM_WIDTH, seed=0) -> VisionBridge:
    torch.manual_seed(seed)
    stage, grid = config.encoder_output_stage, config.encoder_target_spatial
    encoder = NnUNetEncoder.from_checkpoint(load_nnunet_checkpoint(source[0]), stage, grid, config.slices)
    return VisionBridge.build(config, encoder, width, 0.1, with_cmi=with_cmi).eval()


def save(path: Path, vision: VisionBridge, plan: PreprocessPlan, config: Config, **changes: object) -> Path:
    values = {"stage": "vision", "step": 30, "epoch": 3, "val_loss": 0.25, "diagnostics": DIAGNOSTICS}
    llm = {"name": "tiny-mamba", "width": LLM_WIDTH, "layers": 2, "vocabulary": 264, "tokens": 257}
    save_checkpoint(path, vision, config=config, plan=plan, **{"llm": llm, **values, **changes})
    return path


@pytest.fixture
def saved(tmp_path, source) -> Path:
    config = configuration()
    return save(tmp_path / "vision_bridge_final.pt", vision_of(source, config), source[1], config)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 600
    return message


def config_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)["config"]


def edited(path: Path, remove: str | None = None, **changes: object) -> Path:
    content = torch.load(path, weights_only=True)
    content.update(changes)
    content.pop(remove, None)
    torch.save(content, path)
    return path


# ---------------------------------------------------------------- round trip


def test_everything_that_was_saved_comes_back(tmp_path, source):
    config = configuration(roi_side=4, path_map={"d:/": "/mnt/d/"}, caption_csv_train="/data/训练.csv")
    vision, collapsed = vision_of(source, config), {**DIAGNOSTICS, "collapsed": True}
    path = save(tmp_path / "a.pt", vision, source[1], config, stage="vlm", diagnostics=collapsed)
    loaded = load_checkpoint(path)
    assert (loaded.path, loaded.stage, loaded.step, loaded.epoch, loaded.val_loss) == (path, "vlm", 30, 3, 0.25)
    assert loaded.config == config and loaded.preprocess_plan == source[1]
    assert loaded.llm["width"] == LLM_WIDTH and loaded.diagnostics == collapsed
    assert loaded.encoder_architecture == vision.encoder.architecture
    assert loaded.collapsed and not loaded.has_cmi
    torch.testing.assert_close(loaded.model_state_dict, dict(vision.state_dict()), rtol=0, atol=0)


def test_torch_opens_it_without_running_code(saved):
    content = torch.load(saved, weights_only=True)
    assert content["format"] == "mamba-ct-report" and content["version"] == 3
    wanted = {"model_state_dict", "step", "epoch", "val_loss", "config", "preprocess_plan", "llm", "diagnostics"}
    assert wanted < set(content)
    assert not any(key.startswith("lm.") for key in content["model_state_dict"])


@pytest.mark.parametrize("with_cmi", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"roi_side": 4, "slices": 2},
        {"encoder_output_stage": 1, "cmi_compress_to": 4},
        {"roi_side": 2, "roi_policy": "lesion", "slices": 2, "max_visual_tokens": 16},
    ],
)
def test_build_vision_gives_the_same_tokens_bit_for_bit(tmp_path, source, with_cmi, keys):
    """And without nnU-Net's own file, which stays with whoever trained the encoder."""
    config = configuration(**keys)
    vision = vision_of(source, config, with_cmi=with_cmi)
    path = save(tmp_path / "a.pt", vision, source[1], config.replace(nnunet_encoder_checkpoint="/nowhere/best.pth"))
    images = torch.randn(2, config.slices, 1, *source[1].patch_size)
    position, roi = torch.rand(2, config.slices), torch.rand(2, config.slices, 4)
    question = torch.randn(2, 3, LLM_WIDTH), torch.ones(2, 3)
    torch.manual_seed(99)  # nothing of the random start may show
    rebuilt = load_checkpoint(path).build_vision().eval()
    with torch.no_grad():
        looks = (part.visual_tokens(part.features(images), position, roi) for part in (rebuilt, vision))
        one, other = (part.steer(seen, *question) for part, seen in zip((rebuilt, vision), looks, strict=True))
    assert torch.equal(one, other)
    assert rebuilt.bridge.spec == vision.bridge.spec


def test_a_checkpoint_from_before_a_key_existed_has_its_default(saved):
    config = config_of(saved)
    del config["roi_policy"]
    loaded = load_checkpoint(edited(saved, config=config))
    assert loaded.config.roi_policy == "centre" and loaded.build_vision().bridge.spec.lesion_side == 0
    assert not loaded.collapsed


# ---------------------------------------------------------------- what is refused


def test_missing_file_and_folder(tmp_path):
    assert "checkpoint not found" in refusal(tmp_path / "absent.pt")
    assert "checkpoint is a folder" in refusal(tmp_path)
    with pytest.raises(InputError, match="training state not found"):
        read_torch_file(tmp_path / "absent.pt", "training state")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.9999])
def test_truncated_file(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    assert "not a readable checkpoint" in refusal(saved) and "truncated" in refusal(saved)


def test_damaged_file(saved):
    content = bytearray(saved.read_bytes())
    start = content.index(b"data.pkl") + 200
    content[start : start + 64] = bytes(64)
    saved.write_bytes(content)
    assert "not a readable checkpoint" in refusal(saved)


@pytest.mark.parametrize("content", [b"", b"hello world", "报告".encode(), b"\x80\x02}q\x00.", bytes(range(256)) * 9])
def test_files_of_other_kinds(tmp_path, content):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    assert "not a readable checkpoint" in refusal(path)


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"format": "mamba-ct-report", "attack": Attack()}, tmp_path / "a.pt")
    assert "not a readable checkpoint" in refusal(tmp_path / "a.pt")
    assert not (tmp_path / "executed").exists()


def test_archives_state_dicts_and_lists_of_somebody_else(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    assert "not a readable checkpoint" in refusal(path)
    torch.save({"model_state_dict": {"a": torch.zeros(3)}, "epoch": 3}, path)
    assert "not a checkpoint of this project" in refusal(path)
    torch.save([1, 2], path)
    assert "expected a dictionary, found list" in refusal(path)


def test_nnunets_own_file_is_recognised(assets):
    for kind in ("2d_plain", "2d_resenc", "3d_plain"):
        path = assets / "nnunet_tiny" / kind / "fold_0" / "checkpoint_best.pth"
        assert "give it as nnunet_encoder_checkpoint" in refusal(path)


def test_newer_version(saved):
    assert "format version 4, this program knows 3: update" in refusal(edited(saved, version=4))


def test_older_version_passes_through_its_migrations(saved, monkeypatch):
    def renamed(content: dict) -> dict:
        return {**content, "epoch": content["epochs_done"]}

    monkeypatch.setattr(pretrained, "MIGRATIONS", {**pretrained.MIGRATIONS, 0: renamed})
    assert load_checkpoint(edited(saved, remove="epoch", version=0, epochs_done=7)).epoch == 7


NEEDED = [
    name for name in Checkpoint.__dataclass_fields__ if name not in ("path", "adapters", "scan_checks", "findings")
]


@pytest.mark.parametrize("name", ["version", *NEEDED])
def test_missing_part_is_named(saved, name):
    assert f"it has no '{name}'" in refusal(edited(saved, remove=name))


def test_damaged_plan_and_configuration_are_named(saved):
    plan = torch.load(saved, weights_only=True)["preprocess_plan"]
    with pytest.raises(InputError, match="spacing"):
        load_checkpoint(edited(saved, preprocess_plan={key: plan[key] for key in plan if key != "spacing"}))
    edited(saved, preprocess_plan=plan, config={**config_of(saved), "slices": "3"})
    assert "'slices' is '3', expected a whole number" in refusal(saved)


def test_key_of_the_configuration_that_no_longer_exists_is_ignored(saved):
    assert load_checkpoint(edited(saved, config={**config_of(saved), "abolished": 1})).config == configuration()


# ---------------------------------------------------------------- loading into a model


def test_checkpoint_without_cmi_into_a_model_with_it_names_what_starts_at_random(saved, source):
    vision = vision_of(source, configuration(), with_cmi=True, seed=3)
    start = {key: value.clone() for key, value in vision.state_dict().items()}
    loaded = load_checkpoint(saved)
    at_random = load_vision_weights(vision, loaded)
    assert at_random == [key for key in vision.state_dict() if key.startswith("cmi.")] and "cmi.A_log" in at_random
    for key, value in vision.state_dict().items():
        assert torch.equal(value, start[key] if key in at_random else loaded.model_state_dict[key]), key


@pytest.mark.parametrize(("key", "value"), [("bridge_mixer", "one_way"), ("bridge_pool", "before"), ("roi_scales", 2)])
def test_a_choice_that_no_longer_exists_is_refused_by_name_and_its_kept_value_loads(saved, key, value):
    kept = {**config_of(saved), key: REMOVED[key]}
    assert load_checkpoint(edited(saved, config=kept)).config == configuration()
    message = refusal(edited(saved, config={**kept, key: value}))
    assert f"was trained with {key}: {value}, which is no longer a choice" in message


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("policy", "loads"), [("centre", True), ("lesion", False)])
def test_an_older_checkpoint_loads_unless_it_has_tokens_around_lesions(saved, version, policy, loads):
    edited(saved, version=version, config={**config_of(saved), "roi_policy": policy})
    if loads:
        assert load_checkpoint(saved).config.roi_policy == policy
    else:
        assert f"{saved}: it was trained with roi_policy: lesion of an older version" in refusal(saved)


def test_a_head_that_learnt_its_sizes_keeps_them_until_they_are_fitted(tmp_path, source):
    config = configuration()
    vision = vision_of(source, config)
    vision.add_head(["nodule", "effusion"])
    torch.nn.init.ones_(vision.head.of_lesion.bias)
    path = save(tmp_path / "older.pt", vision, source[1], config)
    content = torch.load(path, weights_only=True)
    del content["model_state_dict"]["head.size_weights"], content["model_state_dict"]["head.size_range"]
    torch.save(content, path)
    head = load_checkpoint(path).build_vision().eval().head
    visual, lesions = torch.randn(1, 9, LLM_WIDTH), torch.rand(1, 3, DESCRIPTORS)
    learnt = head(visual, lesions).lesion_size
    torch.testing.assert_close(learnt, torch.ones(1, 3))
    head.set_sizes(head.size_weights, head.size_range)
    assert not head(visual, lesions).lesion_size.any()


@pytest.mark.parametrize(("key", "value"), [("bridge_width", 32), ("bridge_depth", 2), ("encoder_target_spatial", 7)])
def test_another_network_names_a_weight_and_a_key_and_changes_nothing(saved, source, key, value):
    vision = vision_of(source, configuration(**{key: value}), seed=4)
    before = {name: weight.clone() for name, weight in vision.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_vision_weights(vision, load_checkpoint(saved))
    message = str(caught.value)
    assert "does not fit this configuration at 'bridge." in message and str(saved) in message
    assert key in message or key == "encoder_target_spatial"
    torch.testing.assert_close(dict(vision.state_dict()), before, rtol=0, atol=0)


# ---------------------------------------------------------------- going on from it


MUST_AGREE = {"encoder_output_stage": 1, "encoder_target_spatial": 14, "bridge_depth": 3, "bridge_width": 64}


@pytest.mark.parametrize(("key", "value"), [*MUST_AGREE.items(), ("roi_policy", "lesion")])
def test_setting_that_must_agree_is_named_with_both_values(saved, key, value):
    loaded = load_checkpoint(saved)
    there = yaml.safe_dump({key: getattr(loaded.config, key)}).strip()
    words = f"trained with {there}, the configuration says {key}: {value}; set {there}, or"
    with pytest.raises(InputError, match=words):
        check_agreement(loaded, configuration(**{key: value}))
    assert build_config(yaml.safe_load(there), "the advice")


def test_all_settings_that_must_agree_are_named_at_once(saved):
    """``roi_side`` may change only between two centre crops: a remedy that names one key alone would be refused."""
    words = "says roi_side: 2 and roi_policy: lesion; set roi_side: null and roi_policy: centre, or"
    with pytest.raises(InputError, match=words):
        check_agreement(load_checkpoint(saved), configuration(roi_side=2, roi_policy="lesion"))


def test_setting_that_may_differ_is_said(saved):
    loaded = load_checkpoint(saved)
    assert check_agreement(loaded, configuration()) == []
    notes = check_agreement(loaded, configuration(max_visual_tokens=4, slices=2, use_cmi=True, cmi_compress_to=3))
    named = [note.split()[1].rstrip(":") for note in notes]
    assert named == ["slices", "max_visual_tokens", "use_cmi", "cmi_compress_to"]
    assert notes[1] == f"note: max_visual_tokens: 9 in {saved.name}, now max_visual_tokens: 4"


def test_stage_0_adapters_are_part_of_a_stage_2_checkpoint(saved, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "adapter_digest", lambda path: "1111" if path else "")
    first = load_checkpoint(saved)
    assert check_agreement(first, configuration(language_model_adapters="a.safetensors")) == [], "Stage 1 reads no text"
    trained = replace(first, stage="vlm", llm={**first.llm, "adapters": "1111"})
    assert check_agreement(trained, configuration(language_model_adapters="a.safetensors")) == []
    with pytest.raises(InputError, match="language_model_adapters is empty .none., .* was trained with .*1111"):
        check_agreement(trained, configuration())
    older = replace(first, stage="vlm")
    assert check_agreement(older, configuration()) == []
    with pytest.raises(InputError, match="a.safetensors .1111., .* was trained with empty .none.: set language_model_"):
        check_agreement(older, configuration(language_model_adapters="a.safetensors"))


def test_slices_of_a_3d_encoder_are_part_of_the_network(saved):
    loaded = load_checkpoint(saved)
    plan = replace(loaded.preprocess_plan, dim=3, patch_size=(8, 16, 16), spacing=(1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="slices: 1, the configuration says slices: 2"):
        check_agreement(replace(loaded, preprocess_plan=plan), configuration(slices=2))


@pytest.mark.parametrize(("there", "here"), [(None, 3), (3, None), (2, 4)])
def test_the_centre_crop_has_no_parameters_and_may_change(tmp_path, source, there, here):
    config = configuration(roi_side=there)
    loaded = load_checkpoint(save(tmp_path / "a.pt", vision_of(source, config), source[1], config))
    other = configuration(roi_side=here)
    [note] = check_agreement(loaded, other)
    assert note.startswith("note: roi_side: ") and "in a.pt, now roi_side: " in note and "None" not in note
    assert load_vision_weights(vision_of(source, other), loaded) == []
