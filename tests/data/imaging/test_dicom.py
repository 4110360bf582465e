"""DICOM series: which are read, which are refused and why, and that left stays left."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from pydicom.uid import MRImageStorage

from config.errors import InputError
from data.cache import VolumeCache
from data.imaging.dicom import series_in
from data.imaging.reader import files_of, read_header, read_mask, read_volume
from tests.data.imaging.images import PLAN_2D, SPACING, dicom_slice, marked, store_as, write_series


def save(file: Path, z: float = 0.0, pixels: np.ndarray | None = None, **options: object) -> None:
    """One slice, of zeros by default, with overridden tags."""
    file.parent.mkdir(exist_ok=True)
    data = dicom_slice(np.zeros((5, 6), np.uint16) if pixels is None else pixels, z, **options)
    data.save_as(file, enforce_file_format=True)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_volume(path)
    message = str(caught.value)
    assert "\n" not in message and str(path.parent) in message
    return message


def test_a_series_equals_the_same_scan_in_nifti(tmp_path):
    write_series(tmp_path / "series", marked())
    store_as(tmp_path / "scan.nii.gz", marked(), "RAS")
    series, scan = read_volume(tmp_path / "series"), read_volume(tmp_path / "scan.nii.gz")
    assert series.array.dtype == np.float32 and series.array.flags.c_contiguous
    assert np.array_equal(series.array, marked()) and series.spacing == SPACING
    assert np.allclose(series.affine, scan.affine) and read_header(tmp_path / "series").notes == ()
    store_as(tmp_path / "mask.nii.gz", (marked() > 0).astype(np.uint8), "PIR")
    assert np.array_equal(read_mask(tmp_path / "mask.nii.gz", series), marked() > 0)


def test_slices_are_sorted_by_position_whatever_their_names_and_folders(tmp_path):
    files = write_series(tmp_path / "a", marked())
    (tmp_path / "a" / "deeper").mkdir()
    files[2].rename(tmp_path / "a" / "deeper" / "zzz")  # no suffix: known by its mark
    assert np.array_equal(read_volume(tmp_path / "a").array, marked())


def test_each_slice_is_rescaled_by_its_own_numbers(tmp_path):
    hu = np.arange(3 * 5 * 6).reshape(3, 5, 6) * 2 - 100
    for index, (slope, intercept) in enumerate([(1, -100), (2, -100), (0.5, -200)]):
        stored = ((hu[index] - intercept) / slope).astype(np.int16)
        save(tmp_path / "s" / f"{index}.dcm", index * 3.0, stored, RescaleSlope=slope, RescaleIntercept=intercept)
    assert np.array_equal(read_volume(tmp_path / "s").array, hu)


def test_feet_first_and_coronal_series_are_turned(tmp_path):
    """Slices from front to back, rows from top to bottom: (y, z, x) of the LPS array."""
    plane = {"PixelSpacing": [SPACING[0], SPACING[2]], "ImageOrientationPatient": [1.0, 0, 0, 0, 0, -1.0]}
    for index in range(5):
        pixels = (marked()[::-1, index].astype(np.int32) + 1024).astype(np.uint16)
        save(tmp_path / "c" / f"{index}", pixels=pixels, ImagePositionPatient=[0.0, 2.0 * index, 9.0], **plane)
    volume = read_volume(tmp_path / "c")
    assert np.array_equal(volume.array, marked()) and volume.spacing == SPACING


@pytest.mark.parametrize("compressor", ["JPEG2000", "JPEG"])
def test_compressed_slices_are_unpacked_by_simpleitk(tmp_path, compressor):
    """Written by SimpleITK's GDCM; values that neither codec may round."""
    array = np.random.default_rng(0).integers(-1000, 400, (3, 16, 16)).astype(np.int16)
    (tmp_path / "s").mkdir()
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    tags = {"0008|0060": "CT", "0020|000e": "1.2.3.9", "0020|0037": r"1\0\0\0\1\0", "0028|1052": "0", "0028|1053": "1"}
    for index in range(3):
        image = SimpleITK.GetImageFromArray(array[index : index + 1])
        image.SetSpacing((1.5, 2.0, 3.0))
        image.SetOrigin((0, 0, 3.0 * index))
        for tag, value in {**tags, "0020|0032": rf"0\0\{3 * index}", "0020|0013": str(index)}.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(tmp_path / "s" / f"{index}.dcm"))
        writer.Execute(image)
    assert all(series.headers[0].file_meta.TransferSyntaxUID.is_compressed for series in series_in(tmp_path / "s"))
    volume = read_volume(tmp_path / "s")
    assert np.array_equal(volume.array, array) and volume.spacing == pytest.approx((3.0, 2.0, 1.5))


def test_several_series_are_listed_and_one_file_chooses(tmp_path):
    write_series(tmp_path / "s", marked(), "lung")
    soft = write_series(tmp_path / "s", marked() // 2, "soft", SeriesInstanceUID="1.2.3.2", SeriesNumber=3)
    message = refusal(tmp_path / "s")
    assert "holds 2 CT series" in message and "lung001.dcm" in message and "soft001.dcm" in message
    assert read_volume(soft[1]).array[3, 4, 5] == 350
    assert [str(series) for series in series_in(tmp_path / "s")][1].startswith("3 'Chest' (4 images")


def test_scouts_and_objects_without_pixels_are_left_out_and_said(tmp_path, caplog):
    write_series(tmp_path / "s", marked())
    scout = {"SeriesInstanceUID": "1.9", "SeriesNumber": 1, "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    save(tmp_path / "s" / "scout.dcm", **scout)
    dose = {"SeriesInstanceUID": "1.8", "Modality": "SR", "Rows": None, "Columns": None, "PixelData": None}
    save(tmp_path / "s" / "dose.dcm", **dose)
    (tmp_path / "s" / "readme.txt").write_text("export of 3 November", encoding="utf-8")
    volume = read_volume(tmp_path / "s")
    assert np.array_equal(volume.array, marked())
    assert all(words in caplog.text for words in ("a scout", "no pixels", "left out series 1"))


@pytest.mark.parametrize("name", ["000.dcm", "zzz.dcm"])
def test_a_scout_inside_a_series_is_left_out(tmp_path, caplog, name):
    write_series(tmp_path / "s", marked(), SeriesInstanceUID=None)
    save(tmp_path / "s" / name, SeriesInstanceUID=None, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    assert np.array_equal(read_volume(tmp_path / "s").array, marked()) and "a scout" in caplog.text


def test_another_series_and_other_files_do_not_decide_a_named_one(tmp_path):
    files = write_series(tmp_path / "s", marked())
    before = files_of(files[1])
    write_series(tmp_path / "s", marked() // 2, "soft", SeriesInstanceUID="1.2.3.2", SeriesNumber=3)
    (tmp_path / "s" / "reports").mkdir()
    (tmp_path / "s" / "reports" / "report.txt").write_text("x", encoding="utf-8")
    assert before == files_of(files[1]) == sorted(files)


@pytest.mark.parametrize("tags", [("SeriesInstanceUID",), ("Modality",), ("SeriesInstanceUID", "Modality")])
def test_an_anonymised_series_is_read_where_its_geometry_is_sound(tmp_path, caplog, tags):
    files = write_series(tmp_path / "s", marked(), **dict.fromkeys(tags))
    for path in (tmp_path / "s", files[0]):
        volume = read_volume(path)
        [note] = read_header(path).notes
        assert np.array_equal(volume.array, marked()) and f"has no {' and no '.join(tags)}" in note
    assert note in caplog.text
    if "SeriesInstanceUID" in tags:
        write_series(tmp_path / "s", marked(), "second", **dict.fromkeys(tags))
        assert "two slices lie at" in refusal(tmp_path / "s")


def _tilt(folder: Path) -> None:
    for index, file in enumerate(sorted(folder.iterdir())):
        save(file, ImagePositionPatient=[0.0, 0.6 * index, 3.0 * index])


def _all_but_one(folder: Path) -> None:
    for file in sorted(folder.iterdir())[1:]:
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: (s / "slice002.dcm").unlink(), "1 slice(s) are missing, for example between 3.00 and 9.00 mm"),
        (lambda s: save(s / "again.dcm", 3.0), "two slices lie at 3.00 mm"),
        (lambda s: save(s / "odd.dcm", 13.0), "3.00 to 4.00 mm apart"),
        (lambda s: save(s / "big.dcm", 12.0, np.zeros((7, 6), np.uint16)), "size, spacing or direction differ"),
        (_tilt, "tilted by 11.3 degrees"),
        (_all_but_one, "single image"),
    ],
)
def test_damaged_series(tmp_path, damage, words):
    write_series(tmp_path / "s", marked())
    damage(tmp_path / "s")
    assert words in refusal(tmp_path / "s")


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"Modality": None, "kind": MRImageStorage}, "modality not given, stored as MR Image Storage, expected CT"),
        ({"RescaleIntercept": None}, "has no RescaleIntercept"),
        ({"RescaleSlope": 0}, "rescale slope is 0"),
        ({"PixelSpacing": [0.0, 0.0]}, "voxel sizes"),
        ({"ImageOrientationPatient": [1.0, 0, 0, 1.0, 0, 0]}, "no pair of axes"),
        ({"Rows": 30000, "Columns": 30000}, "more than a file of"),
    ],
)
def test_tags_that_make_no_volume(tmp_path, tags, words):
    write_series(tmp_path / "s", marked(), **tags)
    assert words in refusal(tmp_path / "s")


def test_the_header_needs_no_pixels(tmp_path):
    for file in write_series(tmp_path / "s", marked()):
        file.write_bytes(file.read_bytes()[:-60] + b"\xff" * 60)
    header = read_header(tmp_path / "s")
    assert header.shape == (6, 5, 4) and header.axcodes == "LPS" and header.spacing == SPACING
    assert header.extent_mm == (12.0, 10.0, 9.0)


def test_the_cache_notices_a_changed_slice_and_another_series(tmp_path):
    files = write_series(tmp_path / "s" / "deeper", marked())
    write_series(tmp_path / "t", marked() // 2)
    cache = VolumeCache(tmp_path / "cache", PLAN_2D)
    named = (tmp_path / "s", tmp_path / "s" / "deeper", files[1])  # the folder above, the folder, one file
    before = [cache.entry(path) for path in named]
    assert cache.entry(tmp_path / "t") not in before and before == [cache.entry(path) for path in named]
    assert set(files_of(tmp_path / "s")) == set(files)
    files[0].write_bytes(files[0].read_bytes()[:-2] + b"\x10\x27")
    assert not set(before) & {cache.entry(path) for path in named}
    nib.save(nib.Nifti1Pair(marked().transpose(2, 1, 0), np.diag([-1.5, -2, 3, 1])), tmp_path / "pair.hdr")
    pair = cache.entry(tmp_path / "pair.hdr")
    (tmp_path / "pair.img").write_bytes(b"\1" * 240)
    assert cache.entry(tmp_path / "pair.hdr") != pair


def test_the_cache_prepares_a_series_as_it_prepares_nifti(tmp_path):
    array = np.random.default_rng(0).integers(-1000, 400, (4, 5, 6))
    write_series(tmp_path / "s", array)
    store_as(tmp_path / "scan.nii.gz", array.astype(np.int16), "SRP")
    cache = VolumeCache(tmp_path / "cache", PLAN_2D)
    assert np.array_equal(cache.get(tmp_path / "s").image, cache.get(tmp_path / "scan.nii.gz").image)
