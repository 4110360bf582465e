"""The configuration: every key documented, every mistake named, paths the same from every folder and machine."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import get_args

import pytest
import yaml

from config.errors import InputError
from config.schema import (
    DEFAULT_CONFIG,
    FIELDS,
    REPOSITORY,
    Config,
    FindingsPrompt,
    build_config,
    keys_with_role,
    load_config,
    resolve_path,
    write_config,
    yaml_line,
)


def config_file(folder: Path, text: str) -> Path:
    path = folder / "paths.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(config_file(folder, text))
    message = str(caught.value)
    assert "\n" not in message, "one line"
    return message


# ---------------------------------------------------------------- the shipped file


def test_shipped_file_loads_and_points_into_the_repository():
    config = load_config()
    assert config == load_config(DEFAULT_CONFIG)
    for key in ("caption_csv_train", "caption_csv_val", "caption_prompt_json", "nnunet_encoder_checkpoint"):
        assert config.resolved(key).is_relative_to(REPOSITORY)
    assert not config.use_cmi and config.roi_side is None and config.cmi_compress_to is None


def test_shipped_file_has_every_key_once_with_a_comment_above_it():
    lines = DEFAULT_CONFIG.read_text(encoding="utf-8").splitlines()
    commented = ("roi_side", "roi_policy", "use_cmi", "cmi_compress_to")
    for key in FIELDS:
        start = f"# {key}:" if key in commented else f"{key}:"
        found = [number for number, line in enumerate(lines) if line.startswith(start)]
        assert len(found) == 1, key
        above = lines[found[0] - 1]
        assert above.startswith("# ") and len(above) > 12 and ": " not in above.split(" ")[1], (key, above)


def test_commented_keys_load_once_uncommented(tmp_path):
    text = DEFAULT_CONFIG.read_text(encoding="utf-8")
    for key in ("roi_side", "roi_policy", "use_cmi", "cmi_compress_to"):
        text = text.replace(f"# {key}:", f"{key}:")
    config = load_config(config_file(tmp_path, text))
    assert (config.roi_side, config.use_cmi) == (7, True) and config.cmi_compress_to is not None


@pytest.mark.parametrize("mode", get_args(FindingsPrompt))
def test_every_choice_is_read_without_quotes(tmp_path, mode):
    """YAML 1.1 reads a bare off as false."""
    path = config_file(tmp_path, f"findings_prompt: {mode}\n")
    assert load_config(path).findings_prompt == mode
    write_config(load_config(path), path)
    assert load_config(path).findings_prompt == mode


def test_shipped_values_of_the_network_are_the_defaults():
    config, defaults = load_config(), Config()
    for key in keys_with_role("arch") + keys_with_role("tokens") + keys_with_role("run"):
        assert getattr(config, key) == getattr(defaults, key), key


# ---------------------------------------------------------------- mistakes


NEAREST = {"caption_csv_trian": "caption_csv_train", "roi_size": "roi_side", "max_visual_token": "max_visual_tokens"}
NEAREST |= {"Use_CMI": "use_cmi", "nnunet_checkpoint": "nnunet_encoder_checkpoint"}


@pytest.mark.parametrize(("written", "meant"), NEAREST.items())
def test_unknown_key_names_the_nearest(tmp_path, written, meant):
    message = refusal(tmp_path, f"{written}: 3\n")
    assert f"'{written}'" in message and f"did you mean '{meant}'?" in message and "paths.yaml" in message


@pytest.mark.parametrize("key", ["qqqqqq", "7", "true", "2024-11-23"])
def test_a_key_like_no_other_lists_those_that_exist(tmp_path, key):
    message = refusal(tmp_path, f"{key}: 3\n")
    assert "unknown configuration key" in message and "caption_csv_train" in message


WRONG_VALUES = {
    "a whole number": [
        "slices: true",
        'slices: "1"',
        'bridge_depth: "1e-4"',
        "bridge_depth: 1e-4",
        "slices: 1.0",
        "bridge_depth:",
    ],
    "a whole number or nothing (empty)": ["roi_side: seven"],
    "at least": ["slices: 0", "num_workers: -1", "bridge_width: 4", "roi_side: 0"],
    "true or false": ["use_cmi: 1", 'use_cmi: "true"'],
    "a number": ["augment_noise: some", "augment_noise: .nan", "augment_rotate: true"],
    "one of 'auto', 'nnunet', 'mask', 'middle', 'uniform'": ["slice_policy: Mask", "slice_policy: [mask]"],
    "one of 'auto', 'float32', 'bfloat16', 'float16'": ["mamba_dtype: fp16"],
    "text": ["output_dir: 2024-11-23", "mamba_model:"],
    "text or nothing": ["caption_csv_train: [a.csv, b.csv]"],
    "'text: text' pairs": ["path_map: [a, b]", "path_map: {1: /mnt}"],
}


@pytest.mark.parametrize(("expected", "line"), [(e, line) for e, lines in WRONG_VALUES.items() for line in lines])
def test_wrong_value_names_key_value_and_what_was_expected(tmp_path, line, expected):
    message = refusal(tmp_path, line + "\n")
    key = line.split(":")[0]
    assert f"'{key}' is" in message and f"expected {expected}" in message and "paths.yaml" in message


WRONG_FILES = {
    "not valid YAML": ["slices: [1\n", "a: b: c\n", "slices: 1\n  roi_side: 2\n", "x: \x07\n", "a: 1\n---\nb: 2"]
    + ["[a, b]: 1\n", "? {a: 1}\n: 2\n", "{{slices}}: 1\n"],  # collections as keys
    "expected 'key: value' lines": ["- a\n- b\n", "just text\n", "3\n"],
    "found a str; '：' is no colon": ["slices：1\n"],
    "'slices' stands twice (line 3)": ["slices: 1\nroi_side: 7\nslices: 3\n"],
    "'d:/' stands twice": ["path_map:\n  d:/: /mnt/d/\n  d:/: /mnt/e/\n"],
}


@pytest.mark.parametrize(("expected", "text"), [(e, text) for e, texts in WRONG_FILES.items() for text in texts])
def test_wrong_file_is_one_line_that_names_it(tmp_path, expected, text):
    message = refusal(tmp_path, text)
    assert "paths.yaml" in message and expected in message


def test_code_in_yaml_is_not_executed(tmp_path):
    marker = tmp_path / "executed"
    message = refusal(tmp_path, f"slices: !!python/object/apply:os.mkdir ['{marker.as_posix()}']\n")
    assert "not valid YAML" in message and not marker.exists()


@pytest.mark.parametrize("encoding", ["gbk", "utf-16"])
def test_other_encodings_are_refused_with_a_remedy(tmp_path, encoding):
    path = tmp_path / "paths.yaml"
    path.write_bytes("output_dir: 输出\n".encode(encoding))
    with pytest.raises(InputError, match="not UTF-8.*save it as UTF-8"):
        load_config(path)


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "paths.yaml"
    path.write_bytes("\ufeffslices: 3\r\noutput_dir: 输出/一\r\n".encode())
    config = load_config(path)
    assert config.slices == 3 and Path(config.output_dir) == REPOSITORY / "输出" / "一"


def test_missing_file_names_it_and_the_shipped_one(tmp_path):
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "absent.yaml")
    assert "absent.yaml" in str(caught.value) and str(DEFAULT_CONFIG) in str(caught.value)


@pytest.mark.parametrize(
    "name", [r"D:\ct\train.csv", r"D:\xray\train.csv", r"D:\nnunet\best.pth", r"D:\train\a.csv", r"D:\a\readme"]
)
def test_windows_path_in_double_quotes_gets_the_remedy(tmp_path, name):
    """Also where every escape is a known one: \\n is not taken for a line break."""
    assert "forward slashes or in single quotes" in refusal(tmp_path, f'caption_csv_train: "{name}"\n')


def test_windows_path_in_single_quotes_or_plain_is_read(tmp_path):
    for written in (r"'D:\new\train.csv'", r"D:\new\train.csv", "d:/new/train.csv", '"D:\\\\new\\\\train.csv"'):
        config = load_config(config_file(tmp_path, f"caption_csv_train: {written}\n"))
        assert Path(config.caption_csv_train).as_posix().lower() == "d:/new/train.csv"


def test_wide_spaces_and_chinese_in_paths_are_no_control_characters(tmp_path):
    config = load_config(config_file(tmp_path, "output_dir: /数据\u3000二/输出\n"))
    assert Path(config.output_dir).name == "输出" and "\u3000" in config.output_dir


# ---------------------------------------------------------------- overrides and values


@pytest.mark.parametrize(("written", "value"), [("1e-1", 0.1), ("2.5E-2", 0.025), ("+1e0", 1.0)])
def test_a_power_of_ten_is_a_number_although_yaml_reads_text(tmp_path, written, value):
    assert load_config(config_file(tmp_path, f"augment_noise: {written}")).augment_noise == value


def test_overrides_win_unless_they_are_none(tmp_path):
    path = config_file(tmp_path, "slices: 3\nroi_side: 7\n")
    config = load_config(path, slices=None, roi_side=9, max_visual_tokens=96)
    assert (config.slices, config.roi_side, config.max_visual_tokens) == (3, 9, 96)
    with pytest.raises(InputError, match="at least 1"):
        load_config(path, max_visual_tokens=0)


def test_empty_file_gives_the_defaults(tmp_path):
    config = load_config(config_file(tmp_path, "# nothing but a comment\n"))
    assert config == build_config({}, "test")
    assert Path(config.output_dir) == REPOSITORY / "outputs" and Path(config.cache_dir).is_absolute()


def test_resolved_names_an_empty_key(tmp_path):
    config = load_config(config_file(tmp_path, "caption_csv_train:\n"))
    with pytest.raises(InputError, match="'caption_csv_train' is empty"):
        config.resolved("caption_csv_train")


def test_every_field_has_a_role_and_one_line_of_documentation():
    for name, entry in FIELDS.items():
        assert entry.metadata["role"] in ("path", "place", "arch", "tokens", "run"), name
        assert entry.metadata["doc"] and "\n" not in entry.metadata["doc"], name
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().slices = 2


# ---------------------------------------------------------------- paths


def test_relative_paths_start_at_the_repository_whatever_the_working_folder(tmp_path, monkeypatch):
    path = config_file(tmp_path, "caption_csv_train: data/train.csv\noutput_dir: ../beside\n")
    monkeypatch.chdir(tmp_path)
    config = load_config(path)
    assert Path(config.caption_csv_train) == REPOSITORY / "data" / "train.csv"
    assert Path(config.output_dir) == REPOSITORY.parent / "beside"


def test_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve_path("~/ct/a.nii.gz", REPOSITORY) == tmp_path / "ct" / "a.nii.gz"


@pytest.mark.parametrize(
    ("raw", "mapped"),
    [
        (r"D:\ct\patient 1\a.nii.gz", "/mnt/d/ct/patient 1/a.nii.gz"),
        ("d:/ct/a.nii.gz", "/mnt/d/ct/a.nii.gz"),
        ("  d:/ct/a.nii.gz ", "/mnt/d/ct/a.nii.gz"),
        ("D:/CT/B/a.nii.gz", "/mnt/d/CT/B/a.nii.gz"),
        (r"d:\Archive\a.nii.gz", "/mnt/archive/a.nii.gz"),
        ("d:/archive2/a.nii.gz", "/mnt/d/archive2/a.nii.gz"),
        ("d:/archive", "/mnt/archive"),
        (r"\\server\share\a.nii.gz", "/mnt/share/a.nii.gz"),
        ("/mnt/d/ct/a.nii.gz", "/mnt/d/ct/a.nii.gz"),
    ],
)
@pytest.mark.parametrize(("before", "after"), [("/", "/"), ("\\", "/"), ("", ""), ("/", ""), ("", "/")])
def test_path_map_longest_prefix_any_case_any_slash(raw, mapped, before, after):
    """The slash at the end of either side does not matter."""
    targets = {"d:": "/mnt/d", "D:/archive": "/mnt/archive", "//server/share": "/mnt/share"}
    path_map = {prefix.replace("/", "\\") + before: target + after for prefix, target in targets.items()}
    assert resolve_path(raw, REPOSITORY, path_map).as_posix().endswith(mapped)


def test_resolving_twice_is_resolving_once(tmp_path):
    """A resolved configuration is resolved again: by ``replace``, from a checkpoint, from its written copy."""
    root = tmp_path.as_posix()
    path_map = {root: f"{root}/moved"}
    config = build_config({"caption_csv_train": f"{root}/ct/train.csv", "path_map": path_map}, "test")
    assert Path(config.caption_csv_train) == tmp_path / "moved" / "ct" / "train.csv"
    assert config.replace(slices=2).caption_csv_train == config.caption_csv_train


def test_path_map_of_the_file_reaches_every_path_key(tmp_path):
    root = tmp_path.as_posix()
    keys = keys_with_role("path")
    text = f'path_map: {{"q:/": "{root}/"}}\n' + "".join(f"{key}: 'Q:\\{key}'\n" for key in keys)
    config = load_config(config_file(tmp_path, text))
    for key in keys:
        assert Path(getattr(config, key)) == tmp_path / key


def test_drive_of_another_machine_is_not_put_under_the_repository():
    assert resolve_path(r"E:\ct\a.nii.gz", REPOSITORY).as_posix().lower() == "e:/ct/a.nii.gz"


def test_language_model_is_a_hub_name_or_a_folder(tmp_path):
    (tmp_path / "mamba").mkdir()
    folder = str(tmp_path / "mamba")
    if os.path.splitdrive(folder)[0] != os.path.splitdrive(REPOSITORY)[0]:
        folder = str(REPOSITORY / "assets")  # another drive of Windows has no relative path
    relative = Path(os.path.relpath(folder, REPOSITORY)).as_posix()
    names = {"state-spaces/mamba-2.8b-hf": "state-spaces/mamba-2.8b-hf", folder: folder, relative: folder}
    for name, found in names.items():
        assert build_config({"mamba_model": name}, "test").mamba_model == found


# ---------------------------------------------------------------- writing


def test_written_configuration_reads_back_equal(tmp_path):
    values = {
        "caption_csv_train": "/a very long folder name with blanks/" + "and more / " * 12 + "训练: #1.csv",
        "path_map": {"d:/": "/mnt/d/", "e:\\x y": "/mnt/e"},
        "output_dir": "/tmp/'quoted' and \"double\"",
    }
    config = build_config({**values, "roi_side": 7, "use_cmi": True, "mamba_model": "yes"}, "test")
    path = tmp_path / "new folder" / "written.yaml"
    write_config(config, path)
    assert load_config(path) == config


@pytest.mark.parametrize("key", FIELDS)
def test_the_line_that_a_message_advises_loads_and_gives_the_value(tmp_path, key):
    values = {getattr(Config(), key), None, 7, "lesion", "d:/a b/x.pth"} if key != "path_map" else [{"d:/": "/mnt/d/"}]
    loaded = 0
    for value in values:
        try:
            expected = getattr(build_config({key: value}, "test"), key)
        except InputError:
            continue  # not a value of this key
        assert getattr(load_config(config_file(tmp_path, yaml_line(key, value))), key) == expected
        loaded += 1
    assert loaded


def test_written_configuration_has_every_key_and_its_comment(tmp_path):
    path = tmp_path / "written.yaml"
    write_config(load_config(), path)
    text = path.read_text(encoding="utf-8")
    assert list(yaml.safe_load(text)) == list(FIELDS)
    for name, entry in FIELDS.items():
        assert f"# {entry.metadata['doc']}\n{name}:" in text


@pytest.mark.parametrize(("key", "value"), [("bridge_pool", "after"), ("cmi_kind", "gated")])
def test_a_choice_that_no_longer_exists_says_what_to_do(key, value):
    with pytest.raises(InputError, match=f"'{key}' is no longer a choice .*: delete the line"):
        build_config({key: value}, "test")
